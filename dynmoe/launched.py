"""What a process owes to the launcher that started it, and what it finds out about its host for it."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import fcntl
import json
import os
import signal
import socket
import struct
import sys
import threading
import time
from pathlib import Path
from typing import Any

# Directory for the failures of ranks, set by the scripts in launch/.
FAILURES = "DYNMOE_FAILURES"

_TIME_TO_START_S = 5.0
_PR_SET_PDEATHSIG = 1
_SIOCGIFADDR = 0x8915


def end_with_launcher() -> None:
    """Lets the kernel end this rank when its launcher dies, however that happens.

    torchrun gives each rank a session of its own: without this a SIGKILL to the launcher leaves ranks behind that go on
    writing into the run directory beside their successors. A process that was started by hand is not touched. Call it
    before anything slow: what dies earlier goes unnoticed.
    """
    if "LOCAL_RANK" in os.environ:
        end_with_parent(os.getppid())


def end_with_parent(launcher: int) -> None:
    """Lets the kernel end this process when ``launcher``, which started it, dies, or has died. Linux only."""
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != launcher:  # it died before the kernel knew
        os.kill(os.getpid(), signal.SIGKILL)


class Ending:
    """Whether this process was told to end: by SIGTERM, by SIGUSR1 (Slurm, ahead of a time limit) or from a terminal.

    Made before anything slow, so that a signal that comes early is not lost: it then counts after the first step. The
    second interrupt from a terminal ends the process at once.
    """

    def __init__(self) -> None:
        self.told, self._starting = False, True
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._note)
        received, sent = os.pipe()
        os.set_blocking(sent, False)
        signal.set_wakeup_fd(sent, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(received,), name="ending", daemon=True).start()
        # Python gives signals back their defaults while it shuts down: a finished run would end as killed.
        atexit.register(signal.signal, signal.SIGUSR1, signal.SIG_IGN)

    def has_state_to_save(self) -> None:
        """From now on a signal is answered at the end of a step, however long that takes."""
        self._starting = False

    def _listen(self, received: int) -> None:
        """Ends a start that SIGTERM does not: it waits, outside Python, for a rank that will not come."""
        while number := os.read(received, 1):
            if number[0] == signal.SIGTERM:
                time.sleep(_TIME_TO_START_S)
                if self._starting:
                    os._exit(128 + signal.SIGTERM)

    def _note(self, number: int, frame: Any) -> None:
        if self.told and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.told = True


def record_failure(text: str, by_user: bool) -> None:
    """Leaves what ended this rank where its launcher looks for it; without a launcher of ours it does nothing.

    Args:
        text: one line where the user can mend it, else a traceback.
        by_user: whether another start of the same command must fail in the same way.
    """
    directory = os.environ.get(FAILURES)
    if directory is None:
        return
    failure = {
        "rank": int(os.environ.get("RANK", "0")),
        "ranks": int(os.environ.get("WORLD_SIZE", "1")),
        "host": socket.gethostname(),
        # Restarts in place find a new port: what the ranks of one attempt share, on hosts that came later too.
        "attempt": ":".join(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT")),
        "time": time.time(),
        "by_user": by_user,
        "text": text,
    }
    name = f"rank_{failure['rank']}-{failure['host']}-{os.getpid()}.json"
    Path(directory).mkdir(parents=True, exist_ok=True)
    (Path(directory) / f".{name}").write_text(json.dumps(failure))
    (Path(directory) / f".{name}").rename(Path(directory) / name)


def read_failures(directory: Path) -> list[dict[str, Any]]:
    """What ranks left there, of their last attempt only, the first failure first."""
    failures = []
    for path in directory.glob("rank_*.json"):
        # Gone where another node begins the next start, damaged where a host died.
        with contextlib.suppress(FileNotFoundError, ValueError):
            failures.append(json.loads(path.read_text()))
    failures.sort(key=lambda failure: failure["time"])
    return [failure for failure in failures if failure["attempt"] == failures[-1]["attempt"]]


def failure_to_repeat() -> str | None:
    """What ended an earlier attempt of this launch if it must end this one too: torchrun restarts whatever failed.

    Asked by ranks alone, before they do anything: what other launches left was removed before this one began.
    """
    directory = os.environ.get(FAILURES)
    if directory is None or "RANK" not in os.environ:
        return None
    return next((failure["text"] for failure in read_failures(Path(directory)) if failure["by_user"]), None)


def choose_interface() -> None:
    """Names the network interface that reaches the first rank to gloo and NCCL, unless the user has named one.

    gloo asks for the address of this host's own name, which on many machines is a loopback address; NCCL takes the
    first interface that looks usable, which may be a bridge of containers. Both fail late, or hang.
    """
    master = os.environ.get("MASTER_ADDR")
    names = [name for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if name not in os.environ]
    if master is None or not names or not sys.platform.startswith("linux"):
        return
    try:
        interface = _interface_of(address_towards(master))
    except OSError:  # IPv6, or a name that nobody knows: joining the others says so
        return
    if interface is not None:
        os.environ.update(dict.fromkeys(names, interface))


def address_towards(host: str) -> str:
    """The address of this host that ``host`` sees: nothing is sent for finding it out.

    Raises:
        OSError: the name is unknown, or there is no way to it.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 1))
        return probe.getsockname()[0]


def _interface_of(address: str) -> str | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
            except OSError:  # an interface without an address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None
