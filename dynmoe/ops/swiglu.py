"""The gated activation between the two products of an expert, and its gradients, computed in fp32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# fp32 elements of a row block that elementwise operations share on a CPU: about half of a core's L2 cache.
_CHUNK_ELEMENTS_CPU = 1 << 18


def _chunks(rows: Tensor, width: int) -> list[slice]:
    """Splits rows into blocks that stay in a CPU core's cache between elementwise operations; one block on a GPU."""
    num_rows = rows.shape[0]
    step = max(1, _CHUNK_ELEMENTS_CPU // width if rows.device.type == "cpu" else num_rows)
    return [slice(start, start + step) for start in range(0, num_rows, step)]


def gated_activation(h_NH: Tensor, gates_N: Tensor) -> Tensor:
    """Computes g * silu(h1) * h2 for each row, [N, F]."""
    width = h_NH.shape[1] // 2
    chunks = _chunks(h_NH, width)
    if len(chunks) == 1:  # for few rows, the overhead of each call dominates
        return _gated(h_NH, gates_N).to(h_NH.dtype)
    out_NF = h_NH.new_empty(h_NH.shape[0], width)
    for rows in chunks:
        out_NF[rows] = _gated(h_NH[rows], gates_N[rows])
    return out_NF


def _gated(h_NH: Tensor, gates_N: Tensor) -> Tensor:
    h1, h2 = h_NH.float().chunk(2, dim=1)
    return F.silu(h1).mul_(h2).mul_(gates_N[:, None])


def gated_activation_backward(h_NH: Tensor, gates_N: Tensor, grad_NF: Tensor) -> Tensor:
    """Gradients of :func:`gated_activation`; returns the gradient of the gates.

    In place: ``h_NH`` becomes the gradient of h, and ``grad_NF`` the recomputed activation. Nothing of their size is
    allocated.
    """
    width = h_NH.shape[1] // 2
    grad_gates_N = torch.empty_like(gates_N)
    for rows in _chunks(grad_NF, width):
        h1, h2 = h_NH[rows].float().split(width, dim=1)
        gates = gates_N[rows, None]
        grad = grad_NF[rows].float()
        silu = F.silu(h1)
        activation = silu * h2
        # d gate = <grad, activation>: the down projection's output is not needed, so it is not saved.
        grad_gates_N[rows] = torch.linalg.vecdot(grad, activation)
        grad = grad * gates
        grad_h2 = silu.mul_(grad)
        grad_h1 = torch.ops.aten.silu_backward(grad.mul_(h2), h1)
        h_NH[rows, :width] = grad_h1
        h_NH[rows, width:] = grad_h2  # only now: with fp32 rows, h1 and h2 are views of h_NH
        grad_NF[rows] = activation.mul_(gates)
    return grad_gates_N
