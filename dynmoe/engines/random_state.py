"""States of the random generators of a rank, as a file in a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open

from dynmoe.train.tensor_files import save_tensors


def _path(directory: Path) -> Path:
    return directory / f"random_{dist.get_rank():05d}.safetensors"


def copy_random_state(directory: Path) -> Callable[[], Path]:
    """Copies the generators' states; returns a function that writes them and returns the file."""
    cuda = {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_initialized() else {}
    state = {"cpu": torch.get_rng_state(), **cuda}
    path = _path(directory)

    def write() -> Path:
        save_tensors(state, path)
        return path

    return write


def restore_random_state(directory: Path) -> None:
    """Restores this rank's generators, if the checkpoint has states for this rank."""
    if not _path(directory).exists():
        return
    with safe_open(_path(directory), framework="pt") as file:
        torch.set_rng_state(file.get_tensor("cpu"))
        if torch.cuda.is_initialized() and "cuda" in file.keys():  # noqa: SIM118
            torch.cuda.set_rng_state(file.get_tensor("cuda"))
