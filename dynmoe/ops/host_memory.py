"""Settings of the C library's allocator for CPU tensors."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD = -1
_M_TOP_PAD = -2
_M_MMAP_MAX = -4
_LARGEST = 2**31 - 1


def keep_freed_memory() -> None:
    """Lets this process reuse the pages of freed CPU tensors instead of returning them to the system.

    By default glibc maps every large block anew and unmaps it when freed, so every activation of every step causes page
    faults: these took a sixth of an MoE layer's time. Other C libraries keep their settings.
    """
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, _LARGEST)
        libc.mallopt(_M_TOP_PAD, 64 << 20)
