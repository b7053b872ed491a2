"""Routed experts as one opaque operator, which exported models call.

``torch.compile``, ``torch.export`` and inference servers treat it as a black box, because the number of rows changes
with every plan. The first export that a process loads registers it: a change of its meaning needs a new name.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dynmoe.ops.backends import PackedBackend, grouped_mm, looped_mm
from dynmoe.ops.permute import Permutation
from dynmoe.ops.swiglu import gated_activation

Tensors = tuple[Tensor, Tensor, Tensor, Tensor]
# Rows allocated at a time when they are not counted: most of them stay empty but take memory.
_MAX_ROWS_AT_ONCE = 1 << 16
_BYTES = 16  # grouped products need strides that are multiples of this; half an expert may have other strides


def _backend(x_TD: Tensor, w_down_EDF: Tensor) -> PackedBackend:
    strides = (x_TD.shape[1] * x_TD.element_size(), w_down_EDF.shape[2] * x_TD.element_size())
    if x_TD.dtype == torch.float64 or any(stride % _BYTES for stride in strides):
        return PackedBackend("loop", looped_mm)
    return PackedBackend("grouped_mm", grouped_mm)


def _experts(
    x_TD: Tensor, routing_map_TE: Tensor, gates_TE: Tensor, w_up_EHD: Tensor, w_down_EDF: Tensor, most_experts: int
) -> Tensor:
    backend = _backend(x_TD, w_down_EDF)
    if x_TD.device.type == "cpu" or backend.name == "loop":
        permutation = Permutation.of(routing_map_TE)
        return backend.forward(x_TD, gates_TE, w_up_EHD, w_down_EDF, permutation)[0]
    return static_shape_experts(x_TD, routing_map_TE, gates_TE, w_up_EHD, w_down_EDF, most_experts)


def static_shape_experts(
    x_TD: Tensor, routing_map_TE: Tensor, gates_TE: Tensor, w_up_EHD: Tensor, w_down_EDF: Tensor, most_experts: int
) -> Tensor:
    """Computes the same with room for the maximum number of rows; only the device knows how many are in use.

    It can be captured in a CUDA graph, and always sums in the same order.
    """
    step = max(1, _MAX_ROWS_AT_ONCE // most_experts)
    parts = zip(x_TD.split(step), routing_map_TE.split(step), gates_TE.split(step), strict=True)
    return torch.cat([_part(*part, w_up_EHD, w_down_EDF, most_experts) for part in parts])


def _part(
    x_TD: Tensor, routing_map_TE: Tensor, gates_TE: Tensor, w_up_EHD: Tensor, w_down_EDF: Tensor, most_experts: int
) -> Tensor:
    num_tokens, num_experts = routing_map_TE.shape
    max_rows = num_tokens * min(most_experts, num_experts)
    ends_E = routing_map_TE.sum(dim=0).cumsum(0)
    row_TE = routing_map_TE.cumsum(dim=0) - 1 + F.pad(ends_E, (1, 0))[:-1]
    # Entries without a route are written to one extra position at the end.
    places = row_TE.masked_fill(~routing_map_TE, max_rows).flatten()
    routes = torch.arange(num_tokens * num_experts, device=x_TD.device)
    route_N = routes.new_zeros(max_rows + 1).scatter_(0, places, routes)[:-1]
    offsets = F.pad(routing_map_TE.sum(dim=1).cumsum(0), (1, 0))
    place_TE = routing_map_TE.cumsum(dim=1) - 1 + offsets[:-1, None]
    places = place_TE.masked_fill(~routing_map_TE, max_rows).flatten()
    row_N = routes.new_zeros(max_rows + 1).scatter_(0, places, row_TE.flatten())[:-1]
    ends_E = ends_E.to(torch.int32)
    h_NH = F.grouped_mm(x_TD.index_select(0, route_N // num_experts), w_up_EHD.transpose(1, 2), offs=ends_E)
    activation_NF = gated_activation(h_NH, gates_TE.flatten().index_select(0, route_N))
    rows_ND = F.grouped_mm(activation_NF, w_down_EDF.transpose(1, 2), offs=ends_E)
    # Rows past the last route hold arbitrary values: they are summed into one extra token, which is dropped.
    padded_offsets = F.pad(offsets, (0, 1), value=max_rows)
    return F.embedding_bag(row_N, rows_ND, padded_offsets, mode="sum", include_last_offset=True)[:-1]


def _gradients(
    grad_TD: Tensor, x_TD: Tensor, routing_map_TE: Tensor, gates_TE: Tensor, w_up_EHD: Tensor, w_down_EDF: Tensor,
    of_weights: bool,
) -> Tensors:  # fmt: skip
    backend = _backend(x_TD, w_down_EDF)
    permutation = Permutation.of(routing_map_TE)
    # Recomputed, because its size is unknown when a graph is captured; this also repeats the second product.
    _, h_NH = backend.forward(x_TD, gates_TE, w_up_EHD, w_down_EDF, permutation)
    given = (grad_TD.contiguous(), h_NH, x_TD, gates_TE, w_up_EHD, w_down_EDF, permutation)
    grad_x_TD, grad_gates_TE, *of_both = backend.backward(*given, of_weights=of_weights)
    # An operator returns tensors, and two of them may not be the same.
    grad_up_EHD, grad_down_EDF = (w_up_EHD.new_empty(0) if grad is None else grad for grad in of_both)
    return grad_x_TD, grad_gates_TE, grad_up_EHD, grad_down_EDF


def _gradients_like(grad: Tensor, x: Tensor, routing_map: Tensor, gates: Tensor, up: Tensor, down: Tensor,
                    of_weights: bool) -> Tensors:  # fmt: skip
    weights = (torch.empty_like(up), torch.empty_like(down)) if of_weights else (up.new_empty(0), up.new_empty(0))
    return torch.empty_like(x), torch.empty_like(gates), *weights


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:-1])


def _backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
    of_weights = any(ctx.needs_input_grad[3:5])
    grad_x_TD, grad_gates_TE, *weights = torch.ops.dynmoe.experts_gradients_1(grad_TD, *ctx.saved_tensors, of_weights)
    return grad_x_TD, None, grad_gates_TE, *(weights if of_weights else (None, None)), None


def _register() -> None:
    tensors = "Tensor x, Tensor routing_map, Tensor gates, Tensor up, Tensor down"
    forward = "dynmoe::experts_1"
    backward = "dynmoe::experts_gradients_1"
    torch.library.custom_op(forward, _experts, mutates_args=(), schema=f"({tensors}, int most_experts) -> Tensor")
    torch.library.register_fake(forward, lambda x, *others: torch.empty_like(x))
    torch.library.register_autograd(forward, _backward, setup_context=_save)
    schema = f"(Tensor grad, {tensors}, bool of_weights) -> (Tensor, Tensor, Tensor, Tensor)"
    torch.library.custom_op(backward, _gradients, mutates_args=(), schema=schema)
    torch.library.register_fake(backward, _gradients_like)


if not hasattr(torch.ops.dynmoe, "experts_1"):
    _register()


def opaque_experts(
    x_TD: Tensor, routing_map_TE: Tensor, gates_TE: Tensor, w_up_EHD: Tensor, w_down_EDF: Tensor, most_experts: int
) -> Tensor:
    """Sum over the experts of each token of gate * W_down(silu(x W_gate) * (x W_up)), [T, D].

    Args:
        x_TD: tokens, of the dtype of the weights.
        routing_map_TE: bool; which expert computes which token.
        gates_TE: fp32 weight of each expert's output; read where the map is True.
        w_up_EHD: gate and up projections stacked along H = 2F; contraction dimension last, as in ``nn.Linear``.
        most_experts: maximum number of experts of one token; sets how many rows are allocated on a GPU.
    """
    y_TD: Tensor = torch.ops.dynmoe.experts_1(x_TD, routing_map_TE, gates_TE, w_up_EHD, w_down_EDF, most_experts)
    return y_TD
