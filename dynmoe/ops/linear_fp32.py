"""A linear map computed in fp32 from operands of any precision, without saving an fp32 copy of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _LinearFp32(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_ED: Tensor) -> Tensor:
        ctx.save_for_backward(x_TD, weight_ED)
        return x_TD.float() @ weight_ED.float().t()

    @staticmethod
    def backward(ctx: Any, grad_TE: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x_TD, weight_ED = ctx.saved_tensors
        grad_x_TD = (grad_TE @ weight_ED.float()).to(x_TD.dtype)
        return grad_x_TD, (grad_TE.t() @ x_TD.float()).to(weight_ED.dtype)


def linear_fp32(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """``x @ weight.T`` in fp32, [T, E]: the logits of a router. Saves ``x`` as it is."""
    if not torch.is_grad_enabled():
        return x_TD.float() @ weight_ED.float().t()
    return _LinearFp32.apply(x_TD, weight_ED)
