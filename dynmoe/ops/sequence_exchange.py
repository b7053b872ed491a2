"""All-to-all between parts of sequences and parts of heads, for attention under context parallelism.

A rank holds all heads of some positions before, and all positions of some heads after (DeepSpeed-Ulysses, arXiv
2309.14509). Shape suffixes: R ranks, P positions of a rank, S = R P positions, H heads, h = H / R heads of a rank.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _Exchange(torch.autograd.Function):
    """Sends part r of the first dimension to rank r, where the parts of all ranks are put in order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        received = torch.empty_like(x, memory_format=torch.contiguous_format)
        dist.all_to_all_single(received, x.contiguous(), group=group)
        return received

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _Exchange.apply(grad, ctx.group), None


def positions_to_heads(x_PBHd: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The rank's share of the heads at all positions, [S, B, h, d]; collective and differentiable.

    Heads of keys and values are repeated if there are too few for all ranks.
    """
    ranks = dist.get_world_size(group)
    heads = x_PBHd.shape[2]
    x_PBHd = x_PBHd.repeat_interleave(ranks // math.gcd(heads, ranks), dim=2)
    x_RPBhd = x_PBHd.unflatten(2, (ranks, -1)).permute(2, 0, 1, 3, 4)
    return _Exchange.apply(x_RPBhd, group).flatten(0, 1)


def heads_to_positions(x_SBhd: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All heads at the rank's positions, [P, B, H, d]; the inverse of :func:`positions_to_heads`."""
    x_RPBhd = _Exchange.apply(x_SBhd.unflatten(0, (dist.get_world_size(group), -1)), group)
    return x_RPBhd.permute(1, 2, 0, 3, 4).flatten(2, 3)
