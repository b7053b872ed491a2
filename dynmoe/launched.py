"""The interface between a process and its launcher: signals, failure records, and network discovery."""

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

# Environment variable with the directory of failure records, set by the scripts in launch/.
FAILURES = "DYNMOE_FAILURES"

_TIME_TO_START_S = 5.0
_PR_SET_PDEATHSIG = 1
_SIOCGIFADDR = 0x8915


def end_with_launcher() -> None:
    """Makes the kernel kill this rank when its launcher dies for any reason.

    torchrun starts each rank in its own session. Without this, a SIGKILL of the launcher leaves ranks behind that keep
    writing to the run directory while their successors run. Has no effect on a process started by hand. Call it before
    any slow work: an earlier death of the launcher goes unnoticed.
    """
    if "LOCAL_RANK" in os.environ:
        end_with_parent(os.getppid())


def end_with_parent(launcher: int) -> None:
    """Makes the kernel kill this process when ``launcher``, its parent, dies or is already dead. Linux only."""
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != launcher:  # the parent died before the call to prctl
        os.kill(os.getpid(), signal.SIGKILL)


class StopSignal:
    """Records stop requests: SIGTERM, SIGUSR1 (sent by Slurm before a time limit) or an interrupt from a terminal.

    Create it before any slow work, so that an early signal is not lost: training then stops after the first step. A
    second interrupt from a terminal ends the process at once.

    Attributes:
        requested: whether a stop was requested.
    """

    def __init__(self) -> None:
        self.requested = False
        self._starting = True
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._note)
        received, sent = os.pipe()
        os.set_blocking(sent, False)
        signal.set_wakeup_fd(sent, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(received,), name="stop-signal", daemon=True).start()
        # Python restores default handlers while it shuts down: SIGUSR1 would then kill a finished run.
        atexit.register(signal.signal, signal.SIGUSR1, signal.SIG_IGN)

    def has_state_to_save(self) -> None:
        """From now on the end of the current step handles a signal, however long the step takes."""
        self._starting = False

    def _listen(self, received: int) -> None:
        """Ends a start-up that ignores SIGTERM because it waits, outside of Python, for a missing rank."""
        while number := os.read(received, 1):
            if number[0] == signal.SIGTERM:
                time.sleep(_TIME_TO_START_S)
                if self._starting:
                    os._exit(128 + signal.SIGTERM)

    def _note(self, number: int, frame: Any) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True


def record_failure(text: str, by_user: bool) -> None:
    """Writes this rank's failure where its launcher looks for it; does nothing without one of our launchers.

    Args:
        text: one line if the user can fix it, else a traceback.
        by_user: whether restarting the same command must fail in the same way.
    """
    directory = os.environ.get(FAILURES)
    if directory is None:
        return
    failure = {
        "rank": int(os.environ.get("RANK", "0")),
        "ranks": int(os.environ.get("WORLD_SIZE", "1")),
        "host": socket.gethostname(),
        # Restarts in place use a new port, so address and port identify an attempt, also on hosts that joined later.
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
    """Returns the failures of the last attempt in ``directory``, in order of time."""
    failures = []
    for path in directory.glob("rank_*.json"):
        # The file is removed when another node begins the next start, and damaged if a host died.
        with contextlib.suppress(FileNotFoundError, ValueError):
            failures.append(json.loads(path.read_text()))
    failures.sort(key=lambda failure: failure["time"])
    return [failure for failure in failures if failure["attempt"] == failures[-1]["attempt"]]


def failure_to_repeat() -> str | None:
    """Returns the failure of an earlier attempt if it must repeat, because torchrun restarts after any failure.

    Only ranks call it, before any other work. Records of previous launches were removed before this launch began.
    """
    directory = os.environ.get(FAILURES)
    if directory is None or "RANK" not in os.environ:
        return None
    return next((failure["text"] for failure in read_failures(Path(directory)) if failure["by_user"]), None)


def choose_interface() -> None:
    """Sets the network interface for gloo and NCCL to the one that reaches the first rank, unless the user set one.

    gloo asks for the address of this host's own name, which on many machines is a loopback address; NCCL takes the
    first interface that looks usable, which may be a bridge of containers. Both fail late, or hang.
    """
    master = os.environ.get("MASTER_ADDR")
    names = [name for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if name not in os.environ]
    if master is None or not names or not sys.platform.startswith("linux"):
        return
    try:
        interface = _interface_of(address_towards(master))
    except OSError:  # IPv6 or an unknown name: joining the process group reports it
        return
    if interface is not None:
        os.environ.update(dict.fromkeys(names, interface))


def address_towards(host: str) -> str:
    """Returns the address of this host as ``host`` sees it; sends no packet.

    Raises:
        OSError: the name is unknown or unreachable.
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
