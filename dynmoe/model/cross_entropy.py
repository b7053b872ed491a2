"""Cross-entropy of the output projection, computed in chunks without the full [T, V] logits."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dynmoe.config.constants import CHUNK_LOGITS, IGNORED


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes the gradients chunk by chunk in the forward pass, so that no logits are computed twice."""

    @staticmethod
    def forward(ctx: Any, h_TD: Tensor, w_VD: Tensor, labels_T: Tensor, total_tokens: Tensor) -> Tensor:
        num_tokens = h_TD.shape[0]
        chunk = max(1, CHUNK_LOGITS[h_TD.device.type] // w_VD.shape[0])
        differentiate = any(ctx.needs_input_grad)
        grad_h_TD = torch.empty_like(h_TD) if differentiate else None
        grad_w_VD = torch.zeros_like(w_VD, dtype=torch.float32) if differentiate else None
        loss = h_TD.new_zeros((), dtype=torch.float32)
        for start in range(0, num_tokens, chunk):
            h = h_TD[start : start + chunk]
            labels = labels_T[start : start + chunk].unsqueeze(1)
            counts = (labels != IGNORED).float()
            labels = labels.clamp(min=0)
            logits = F.linear(h, w_VD).float()
            largest = logits.amax(dim=1, keepdim=True)
            own = logits.gather(1, labels)
            exponentials = logits.sub_(largest).exp_()  # the only ones, for the loss and its gradient
            total = exponentials.sum(dim=1, keepdim=True)
            loss += ((total.log() + largest - own) * counts).sum()
            if grad_h_TD is None or grad_w_VD is None:
                continue
            grad = exponentials.mul_(counts / (total_tokens * total))  # softmax over T
            grad.scatter_add_(1, labels, -counts / total_tokens)
            grad = grad.to(h.dtype)
            torch.mm(grad, w_VD, out=grad_h_TD[start : start + chunk])
            if h.dtype == torch.float32:
                grad_w_VD.addmm_(grad.t(), h)
            else:
                grad_w_VD += grad.t() @ h
        if differentiate:
            ctx.save_for_backward(grad_h_TD, grad_w_VD)
            ctx.weight_dtype = w_VD.dtype
        return loss / total_tokens

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        grad_h_TD, grad_w_VD = ctx.saved_tensors
        return grad_h_TD * grad, (grad_w_VD * grad).to(ctx.weight_dtype), None, None


def linear_cross_entropy(h_TD: Tensor, w_VD: Tensor, labels_T: Tensor, total_tokens: Tensor | None = None) -> Tensor:
    """Cross-entropy of the logits ``h @ w.T`` in nats; fp32 scalar.

    Args:
        h_TD: inputs of the output projection.
        w_VD: its weight.
        labels_T: the tokens to predict; ``IGNORED`` for none.
        total_tokens: what the sum over tokens is divided by; None: the number of labels that are not ignored.
    """
    if total_tokens is None:
        total_tokens = (labels_T != IGNORED).sum().clamp(min=1)
    return _LinearCrossEntropy.apply(h_TD, w_VD, labels_T, total_tokens)
