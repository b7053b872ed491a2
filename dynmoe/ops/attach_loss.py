"""Auxiliary losses attached to an activation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _AttachLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, loss: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        ctx.dtype = loss.dtype
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        return grad, torch.full((), ctx.scale, dtype=ctx.dtype, device=grad.device), None


def attach_loss(hidden: Tensor, loss: Tensor, scale: float) -> Tensor:
    """Returns ``hidden`` unchanged; the backward pass adds ``scale * loss`` (a scalar) to the objective.

    The auxiliary loss therefore needs no path of its own through pipeline stages and recomputation. ``scale`` must be
    the factor that the engine applies to the main loss (1 / accumulation steps).
    """
    return _AttachLoss.apply(hidden, loss, scale)
