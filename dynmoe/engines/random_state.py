"""Random generators of a rank, as a file of a checkpoint."""

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
    """Copies this rank's generators; what is returned writes them into ``directory``, and returns the file."""
    cuda = {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_initialized() else {}
    state, path = {"cpu": torch.get_rng_state(), **cuda}, _path(directory)

    def write() -> Path:
        save_tensors(state, path)
        return path

    return write


def restore_random_state(directory: Path) -> None:
    """This rank's generators; a rank that the saving run did not have keeps its own."""
    if not _path(directory).exists():
        return
    with safe_open(_path(directory), framework="pt") as file:
        torch.set_rng_state(file.get_tensor("cpu"))
        if torch.cuda.is_initialized() and "cuda" in file.keys():  # noqa: SIM118
            torch.cuda.set_rng_state(file.get_tensor("cuda"))
