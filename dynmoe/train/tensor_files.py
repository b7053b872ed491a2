"""safetensors files with the permissions of ordinary files.

safetensors writes a private temporary file and renames it, so that only its owner could read it
(findings/safetensors_private_files.sh).
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Writes a safetensors file with the permissions that the umask gives."""
    save_file(dict(tensors), path)
    follow_umask(path)


def follow_umask(path: Path) -> None:
    """Sets the permissions of a file to those of a new file."""
    # Reading the umask requires changing it, for all threads; so the permissions of a new file are copied.
    new = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    new.touch()
    path.chmod(new.stat().st_mode & 0o777)
    new.unlink()
