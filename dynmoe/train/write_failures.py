"""Failed writes: whether a restart would help."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
from pathlib import Path

_PERSISTENT = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}
_PROBE_BYTES = 1 << 20


def recurs(failure: Exception, folder: Path) -> bool:
    """Whether a failure to write below ``folder`` would recur after a restart.

    By its errno, which safetensors gives only in its message. torch.save gives none: another file is tried.
    """
    if "inline_container" in str(failure):
        return _has_no_room(folder)
    number = getattr(failure, "errno", None)
    if number is None and (said := re.search(r"os error (\d+)", str(failure))):
        number = int(said.group(1))
    return number in _PERSISTENT


def _has_no_room(folder: Path) -> bool:
    """Whether a small file cannot be written: the disk or a quota is full."""
    probe = folder / f".probe-{secrets.token_hex(4)}"
    try:
        with probe.open("wb") as stream:
            stream.write(bytes(_PROBE_BYTES))
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        return error.errno in _PERSISTENT
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()
    return False
