"""Random generators of a rank, as a file of a checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file


def _path(directory: Path) -> Path:
    return directory / f"random_{dist.get_rank():05d}.safetensors"


def save_random_state(directory: Path) -> Path:
    """Writes this rank's generators."""
    cuda = {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_initialized() else {}
    save_file({"cpu": torch.get_rng_state(), **cuda}, _path(directory))
    return _path(directory)


def restore_random_state(directory: Path) -> None:
    """This rank's generators; a rank that the saving run did not have keeps its own."""
    if not _path(directory).exists():
        return
    with safe_open(_path(directory), framework="pt") as file:
        torch.set_rng_state(file.get_tensor("cpu"))
        if torch.cuda.is_initialized() and "cuda" in file.keys():  # noqa: SIM118
            torch.cuda.set_rng_state(file.get_tensor("cuda"))
