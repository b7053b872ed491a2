"""A second process that ends this one when its interpreter gives no sign of life.

A thread that keeps the interpreter to itself stops every other thread of Python, watchdogs too. A timer in C
(``faulthandler.dump_traceback_later``) would go on, but it counts the time in which the process was stopped, and fires
before Python can say a word when that is over. Another process sees whether this one is stopped.
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

# Its handler is faulthandler's, in C: it writes the stacks of all threads without the interpreter.
_SHOW_STACKS = signal.SIGUSR2
_TIME_TO_WRITE_S = 1.0
# What launchers and terminals send to all processes of a rank: the observer ends with its process.
_NOT_MEANT = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_CODE = "import sys; sys.path.insert(0, sys.argv[1]); from dynmoe.train.pulse import observe; observe(*sys.argv[2:])"


class Pulse:
    """Promises a sign of life at least every ``timeout_s`` of the time in which this process is not stopped.

    A process that breaks it is killed, after it has written its stacks to stderr. Linux tells who is stopped.
    """

    def __init__(self, timeout_s: float) -> None:
        faulthandler.register(_SHOW_STACKS, all_threads=True)
        received, self._sent = os.pipe()
        os.set_blocking(self._sent, False)
        root = str(Path(__file__).parents[2])
        # Without the packages of this environment it starts within hundredths of a second.
        command = [sys.executable, "-I", "-S", "-c", _CODE, root, str(os.getpid()), str(timeout_s)]
        self._observer = subprocess.Popen(command, stdin=received)
        os.close(received)

    def beat(self) -> None:
        """A sign of life."""
        with contextlib.suppress(BlockingIOError, BrokenPipeError):  # many are waiting to be read; or nobody observes
            os.write(self._sent, b".")

    def close(self) -> None:
        """Takes the promise back."""
        self._observer.kill()
        self._observer.wait()
        os.close(self._sent)
        faulthandler.unregister(_SHOW_STACKS)


def observe(pid: str, timeout_s: str) -> None:
    """Reads signs of life of its parent from standard input, until the parent ends or owes one for too long."""
    for number in _NOT_MEANT:
        signal.signal(number, signal.SIG_IGN)
    parent, timeout = int(pid), float(timeout_s)
    tick, silent, has_shown = min(1.0, timeout / 10), 0.0, False
    while silent <= timeout or not has_shown:
        if silent > timeout:
            os.kill(parent, _SHOW_STACKS)
            silent, has_shown = max(0.0, timeout - _TIME_TO_WRITE_S), True
        if select.select([0], [], [], tick)[0]:
            if not os.read(0, 1 << 16):
                return
            silent, has_shown = 0.0, False
        elif os.getppid() != parent:
            return
        elif not _is_stopped(parent):
            silent += tick  # and no more, however long this process itself was stopped
    text = f"no sign of life of process {parent} for {timeout:g} s: one thread keeps the interpreter to itself; killed"
    record_failure(text, by_user=False)
    print(text, file=sys.stderr, flush=True)
    with contextlib.suppress(ProcessLookupError):
        os.kill(parent, signal.SIGKILL)


def _is_stopped(pid: int) -> bool:
    """Whether a process is stopped, by a signal or a debugger."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] in "tT"
    except OSError:
        return False
