"""The gated activation between the two products of an expert, and its gradients, in fp32 arithmetic."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# fp32 elements of one row block between elementwise passes on a CPU: about half of a core's second-level cache.
_CHUNK_ELEMENTS_CPU = 1 << 18


def _chunks(rows_NF: Tensor) -> list[slice]:
    """Row blocks that stay in the cache of a CPU core between elementwise passes; one block elsewhere."""
    num_rows, width = rows_NF.shape
    step = max(1, _CHUNK_ELEMENTS_CPU // width if rows_NF.device.type == "cpu" else num_rows)
    return [slice(start, start + step) for start in range(0, num_rows, step)]


def gated_activation(h_N2F: Tensor, gates_N: Tensor) -> Tensor:
    """g * silu(h1) * h2 for each row, [N, F]."""
    width = h_N2F.shape[1] // 2
    chunks = _chunks(h_N2F[:, :width])
    if len(chunks) == 1:  # a few rows, whose time is that of the calls
        return _gated(h_N2F, gates_N).to(h_N2F.dtype)
    out_NF = h_N2F.new_empty(h_N2F.shape[0], width)
    for rows in chunks:
        out_NF[rows] = _gated(h_N2F[rows], gates_N[rows])
    return out_NF


def _gated(h_N2F: Tensor, gates_N: Tensor) -> Tensor:
    h1, h2 = h_N2F.float().chunk(2, dim=1)
    return F.silu(h1).mul_(h2).mul_(gates_N[:, None])


def gated_activation_backward(h_N2F: Tensor, gates_N: Tensor, grad_NF: Tensor) -> Tensor:
    """Gradients of :func:`gated_activation`; returns that of the gates.

    The gradient of h is written over ``h_N2F``, and the activation, made again, over ``grad_NF``: nothing of their
    size is allocated.
    """
    width = h_N2F.shape[1] // 2
    grad_gates_N = torch.empty_like(gates_N)
    for rows in _chunks(grad_NF):
        h1, h2 = h_N2F[rows].float().split(width, dim=1)
        gates, grad = gates_N[rows, None], grad_NF[rows].float()
        silu = F.silu(h1)
        activation = silu * h2
        # d gate = <grad, activation>: the down projection's output is never needed, so never saved.
        grad_gates_N[rows] = torch.linalg.vecdot(grad, activation)
        grad = grad * gates
        grad_h2 = silu.mul_(grad)
        grad_h1 = torch.ops.aten.silu_backward(grad.mul_(h2), h1)
        h_N2F[rows, :width], h_N2F[rows, width:] = grad_h1, grad_h2  # last: in fp32 h1 and h2 lie there
        grad_NF[rows] = activation.mul_(gates)
    return grad_gates_N
