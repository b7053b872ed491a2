"""Matrix products of consecutive groups of rows, each with its own weight, and the SwiGLU experts built on them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dynmoe.ops.permute import Permutation, gather, scatter_sum

# fp32 elements of one row block between elementwise passes on a CPU: about half of a core's second-level cache.
_CHUNK_ELEMENTS_CPU = 1 << 18


def grouped_mm(a: Tensor, b: Tensor, offsets_E: Tensor) -> Tensor:
    """Grouped GEMM over rows: group e is ``offsets_E[e-1]`` to ``offsets_E[e]`` (int32 ends).

    Args:
        a: [N, J], or [I, N] where the groups run over the contraction (weight gradients).
        b: [E, J, I], or [N, J].

    Returns:
        [N, I]; or [E, I, J], zero for empty groups.
    """
    if a.shape[1 if b.dim() == 2 else 0] == 0:  # the kernel refuses empty operands
        shape = (offsets_E.shape[0], a.shape[0], b.shape[1]) if b.dim() == 2 else (0, b.shape[2])
        return a.new_zeros(shape)
    return torch._grouped_mm(a, b, offs=offsets_E)


def _chunks(rows_NF: Tensor) -> list[slice]:
    """Row blocks that stay in the cache of a CPU core between elementwise passes; one block elsewhere."""
    num_rows, width = rows_NF.shape
    step = max(1, _CHUNK_ELEMENTS_CPU // width if rows_NF.device.type == "cpu" else num_rows)
    return [slice(start, start + step) for start in range(0, num_rows, step)]


def _gated_activation(h_N2F: Tensor, gates_N: Tensor) -> Tensor:
    """g * silu(h1) * h2 for each row in fp32 arithmetic, [N, F]."""
    width = h_N2F.shape[1] // 2
    out_NF = h_N2F.new_empty(h_N2F.shape[0], width)
    for rows in _chunks(out_NF):
        h1, h2 = h_N2F[rows].float().split(width, dim=1)
        out_NF[rows] = F.silu(h1).mul_(h2).mul_(gates_N[rows, None])
    return out_NF


def _gated_activation_backward(h_N2F: Tensor, gates_N: Tensor, grad_NF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`_gated_activation` towards h and the gates, and the activation itself, made again.

    The activation is written over ``grad_NF``.
    """
    width = h_N2F.shape[1] // 2
    grad_h_N2F, grad_gates_N = torch.empty_like(h_N2F), torch.empty_like(gates_N)
    for rows in _chunks(grad_NF):
        h1, h2 = h_N2F[rows].float().split(width, dim=1)
        gates, grad = gates_N[rows, None], grad_NF[rows].float()
        silu = F.silu(h1)
        activation = silu * h2
        # d gate = <grad, activation>: the down projection's output is never needed, so never saved.
        grad_gates_N[rows] = torch.linalg.vecdot(grad, activation)
        grad = grad * gates
        grad_h_N2F[rows, width:] = silu.mul_(grad)
        grad_h_N2F[rows, :width] = torch.ops.aten.silu_backward(grad.mul_(h2), h1)
        grad_NF[rows] = activation.mul_(gates)
    return grad_h_N2F, grad_gates_N, grad_NF


class _SwiGLUExperts(torch.autograd.Function):
    """Saves the inputs and the up projection only; everything else is made again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gates_N: Tensor,
        w_up_EHD: Tensor,
        w_down_EDF: Tensor,
        offsets_E: Tensor,
        permutation: Permutation | None,
    ) -> Tensor:
        rows_ND = x if permutation is None else gather(x, permutation)
        h_N2F = grouped_mm(rows_ND, w_up_EHD.transpose(1, 2), offsets_E)
        ctx.save_for_backward(x, gates_N, w_up_EHD, w_down_EDF, offsets_E, h_N2F)
        ctx.permutation = permutation
        return grouped_mm(_gated_activation(h_N2F, gates_N), w_down_EDF.transpose(1, 2), offsets_E)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, gates_N, w_up_EHD, w_down_EDF, offsets_E, h_N2F = ctx.saved_tensors
        permutation: Permutation | None = ctx.permutation
        grad_ND = grad_ND.contiguous()
        grad_NF = grouped_mm(grad_ND, w_down_EDF, offsets_E)
        grad_h_N2F, grad_gates_N, activation_NF = _gated_activation_backward(h_N2F, gates_N, grad_NF)
        grad_down_EDF = grouped_mm(grad_ND.t(), activation_NF, offsets_E)
        del grad_NF, activation_NF  # one buffer; the weight gradients to come are large
        rows_ND = x if permutation is None else gather(x, permutation)
        grad_up_EHD = grouped_mm(grad_h_N2F.t(), rows_ND, offsets_E)
        grad_x = grouped_mm(grad_h_N2F, w_up_EHD, offsets_E)
        if permutation is not None:
            grad_x = scatter_sum(grad_x, permutation)
        return grad_x, grad_gates_N, grad_up_EHD, grad_down_EDF, None, None


def swiglu_experts(
    x: Tensor,
    gates_N: Tensor,
    w_up_EHD: Tensor,
    w_down_EDF: Tensor,
    tokens_per_expert_E: Tensor,
    permutation: Permutation | None = None,
) -> Tensor:
    """gate * W_down(silu(x W_gate) * (x W_up)) for rows sorted by expert, [N, D].

    The gate scales the activation, so that its gradient needs neither the output nor a second pass over it.

    Args:
        x: inputs of the rows, [N, D], sorted by expert; with a permutation the tokens themselves, [T, D], which are
            then copied to their rows here, and again in the backward pass, instead of being kept as rows.
        gates_N: fp32 weight of each row.
        w_up_EHD: gate and up projections stacked along H = 2F; contraction dimension last, as in ``nn.Linear``.
        w_down_EDF: down projections.
        tokens_per_expert_E: rows of each expert; they add up to N.
        permutation: from tokens to rows.
    """
    offsets_E = tokens_per_expert_E.cumsum(0).to(torch.int32)
    return _SwiGLUExperts.apply(x, gates_N, w_up_EHD, w_down_EDF, offsets_E, permutation)
