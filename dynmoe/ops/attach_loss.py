"""Auxiliary losses that travel with an activation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _AttachLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, loss: Tensor, scale: float) -> Tensor:
        ctx.scale, ctx.dtype = scale, loss.dtype
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        return grad, torch.full((), ctx.scale, dtype=ctx.dtype, device=grad.device), None


def attach_loss(hidden: Tensor, loss: Tensor, scale: float) -> Tensor:
    """Returns ``hidden`` unchanged; in the backward pass ``scale * loss`` (a scalar) is added to the objective.

    An auxiliary loss then needs no way of its own to the end of the model, through pipeline stages and
    recomputation. ``scale`` must be what the engine multiplies the main loss with (1 / accumulation steps).
    """
    return _AttachLoss.apply(hidden, loss, scale)
