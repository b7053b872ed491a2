"""Rotary position embedding (arXiv 2104.09864), also stretched to longer contexts.

Shape suffixes: S positions, d width of a head, j = d / 2 frequencies.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dynmoe.config import ModelConfig


def frequencies(model: ModelConfig, device: torch.device) -> Tensor:
    """Angle per position of each pair of dimensions, fp32 [j].

    Scaling divides each by ``factor``, to a share that depends on how often it turns in the earlier context.
    """
    width = model.width_of_rotated
    plain_j = model.rope_theta ** (-torch.arange(0, width, 2, dtype=torch.float32, device=device) / width)
    kind = model.rope_scaling.kind
    if kind is None:
        return plain_j
    kept_j = {"linear": _kept_by_linear, "yarn": _kept_by_yarn, "llama3": _kept_by_llama3}[kind](model, plain_j)
    return plain_j * kept_j + plain_j / model.rope_scaling.factor * (1.0 - kept_j)


def _kept_by_linear(model: ModelConfig, plain_j: Tensor) -> Tensor:
    """Nothing (arXiv 2306.15595)."""
    return torch.zeros_like(plain_j)


def _kept_by_yarn(model: ModelConfig, plain_j: Tensor) -> Tensor:
    """A ramp over the dimensions between those that turn ``beta_fast`` and ``beta_slow`` times (arXiv 2309.00071)."""
    scaling = model.rope_scaling
    length = scaling.original_length
    assert length is not None
    width = model.width_of_rotated

    def dimension(turns: float) -> float:
        """The dimension whose frequency turns this often in the earlier context."""
        return width * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(model.rope_theta))

    first, last = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    place_j = torch.arange(len(plain_j), dtype=torch.float32, device=plain_j.device)
    return 1.0 - ((place_j - first) / (last - first or 1e-3)).clamp(0, 1)


def _kept_by_llama3(model: ModelConfig, plain_j: Tensor) -> Tensor:
    """A ramp over the turns in the earlier context, from ``low_freq_factor`` to ``high_freq_factor`` (Llama 3.1)."""
    scaling = model.rope_scaling
    assert scaling.original_length is not None
    turns_j = scaling.original_length * plain_j / (2 * math.pi)
    low = scaling.low_freq_factor
    return ((turns_j - low) / (scaling.high_freq_factor - low)).clamp(0, 1)


def rotary_tables(num_positions: int, model: ModelConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotary angles, fp32 [S, d], for pairs (i, i + d / 2).

    The first half of the sines is negated, so that :func:`rotate` only swaps the halves of its input. Both include the
    factor by which YaRN makes queries and keys longer, except in latent attention, which does not rotate all of them.
    """
    angle_Sj = torch.outer(torch.arange(num_positions, dtype=torch.float32, device=device), frequencies(model, device))
    scale = 1.0 if model.latent.enabled else model.rope_scaling.query_key_scale
    cos_Sj = angle_Sj.cos() * scale
    sin_Sj = angle_Sj.sin() * scale
    return torch.cat([cos_Sj, cos_Sj], dim=1), torch.cat([-sin_Sj, sin_Sj], dim=1)


def neighbours(rows: Tensor, blocks: int, rotated: int) -> Tensor:
    """Puts rows that are rotated together next to each other, as DeepSeek-V3 and Megatron-Core store latent attention.

    Args:
        rows: a weight, of whose dimension 0 each block ends in rows that are rotated: i with i + ``rotated`` / 2.
        blocks: number of equal blocks, such as heads.
        rotated: number of these rows of a block.
    """
    return _reordered(rows, blocks, rotated, (2, rotated // 2))


def halves(rows: Tensor, blocks: int, rotated: int) -> Tensor:
    """The inverse of :func:`neighbours`."""
    return _reordered(rows, blocks, rotated, (rotated // 2, 2))


def _reordered(rows: Tensor, blocks: int, rotated: int, grid: tuple[int, int]) -> Tensor:
    """Transposes the last rows of each block, seen as a grid."""
    parts = rows.unflatten(0, (blocks, -1))
    turned = parts[:, -rotated:].unflatten(1, grid).transpose(1, 2).flatten(1, 2)
    return torch.cat([parts[:, :-rotated], turned], dim=1).flatten(0, 1)


def rotate(x_BHSd: Tensor, cos_Sd: Tensor, sin_Sd: Tensor) -> Tensor:
    """Applies the tables; the result has the dtype of ``x``."""
    first, second = x_BHSd.chunk(2, dim=-1)
    swapped = torch.cat([second, first], dim=-1)
    return (x_BHSd * cos_Sd + swapped * sin_Sd).to(x_BHSd.dtype)
