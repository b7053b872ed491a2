"""Tensors in files that others may read as they may read all others.

safetensors writes a private file beside and renames it, so that what it saved were its owner's alone
(findings/safetensors_private_files.sh).
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Writes a safetensors file; its mode is what the umask leaves."""
    save_file(dict(tensors), path)
    follow_umask(path)


def follow_umask(path: Path) -> None:
    """Gives a file the mode of a new one."""
    # The umask itself can only be asked for by changing it, for all threads.
    new = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    new.touch()
    path.chmod(new.stat().st_mode & 0o777)
    new.unlink()
