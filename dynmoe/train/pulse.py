"""Heartbeats to an observer process, which kills this process if they stop.

A thread that never releases the GIL blocks all other Python threads, including watchdogs. A timer in C
(``faulthandler.dump_traceback_later``) would still run, but it counts the time in which the process is stopped
(SIGSTOP), and fires right after SIGCONT. Another process can tell whether this one is stopped.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

from dynmoe.launched import record_failure

# The handler is faulthandler's, in C: it writes the stacks of all threads without the GIL.
_SHOW_STACKS = signal.SIGUSR2
_TIME_TO_WRITE_S = 1.0
# Launchers and terminals send these signals to all processes; the observer exits with its parent instead.
_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_CODE = "import sys; sys.path.insert(0, sys.argv[1]); from dynmoe.train.pulse import observe; observe(*sys.argv[2:])"


class Pulse:
    """Requires a heartbeat at least every ``timeout_s`` seconds in which this process is not stopped.

    Otherwise the process writes its stacks to stderr and is killed. Stopped processes are detected on Linux only.
    """

    def __init__(self, timeout_s: float) -> None:
        faulthandler.register(_SHOW_STACKS, all_threads=True)
        received, self._sent = os.pipe()
        os.set_blocking(self._sent, False)
        root = str(Path(__file__).parents[2])
        # Without site packages the observer starts within hundredths of a second.
        command = [sys.executable, "-I", "-S", "-c", _CODE, root, str(os.getpid()), str(timeout_s)]
        self._observer = subprocess.Popen(command, stdin=received)
        os.close(received)

    def beat(self) -> None:
        """Sends a heartbeat."""
        with contextlib.suppress(BlockingIOError, BrokenPipeError):  # the pipe is full, or the observer is gone
            os.write(self._sent, b".")

    def close(self) -> None:
        """Stops the observer."""
        self._observer.kill()
        self._observer.wait()
        os.close(self._sent)
        faulthandler.unregister(_SHOW_STACKS)


def observe(pid: str, timeout_s: str) -> None:
    """Reads heartbeats of the parent process from standard input until the parent exits or must be killed."""
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    parent = int(pid)
    timeout = float(timeout_s)
    tick = min(1.0, timeout / 10)
    silent = 0.0
    has_shown = False
    while silent <= timeout or not has_shown:
        if silent > timeout:
            os.kill(parent, _SHOW_STACKS)
            silent = max(0.0, timeout - _TIME_TO_WRITE_S)
            has_shown = True
        if select.select([0], [], [], tick)[0]:
            if not os.read(0, 1 << 16):
                return
            silent = 0.0
            has_shown = False
        elif os.getppid() != parent:
            return
        elif not _is_stopped(parent):
            silent += tick  # not the elapsed time, as this process may have been stopped too
    text = f"no heartbeat of process {parent} for {timeout:g} s: one thread does not release the GIL; killed"
    record_failure(text, by_user=False)
    print(text, file=sys.stderr, flush=True)
    with contextlib.suppress(ProcessLookupError):
        os.kill(parent, signal.SIGKILL)


def _is_stopped(pid: int) -> bool:
    """Whether a process is stopped by a signal or a debugger."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] in "tT"
    except OSError:
        return False
