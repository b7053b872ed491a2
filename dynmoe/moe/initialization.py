"""Initial weights that depend only on the seed and the name of the parameter, not on ranks, layout or engine."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def named_normal(shape: tuple[int, ...], std: float, seed: int, name: str) -> Tensor:
    """Normal numbers with mean 0, fp32 on the CPU, from a separate generator for each (seed, name)."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.empty(shape).normal_(0.0, std, generator=generator)
