"""What a process owes to the launcher that started it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def end_with_launcher() -> None:
    """Lets the kernel end this rank when its launcher dies, however that happens.

    torchrun gives each rank a session of its own: without this a SIGKILL to the launcher leaves ranks behind that go on
    writing into the run directory beside their successors. Linux only; a process that was started by hand is not
    touched. Call it before anything slow: what dies earlier goes unnoticed.
    """
    if "LOCAL_RANK" not in os.environ or not sys.platform.startswith("linux"):
        return
    launcher = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != launcher:  # it died before the kernel knew
        os.kill(os.getpid(), signal.SIGKILL)
