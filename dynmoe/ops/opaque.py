"""Routed experts as one operator into which compilers do not look: what exported models call.

``torch.compile``, ``torch.export`` and servers compile around it, as a plan has another number of rows each time. It is
registered once in a process, whichever export comes first: another meaning takes another name.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dynmoe.ops.backends import Gradients, PackedBackend, grouped_mm, looped_mm
from dynmoe.ops.permute import Permutation
from dynmoe.ops.swiglu import gated_activation

# Rows that may exist at a time where they are not counted: most of them are empty, and they take memory all the same.
_MOST_ROWS = 1 << 16
_BYTES = 16  # that the strides of grouped products are multiples of; half an expert may have others


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
    return without_waiting(x_TD, routing_map_TE, gates_TE, w_up_EHD, w_down_EDF, most_experts)


def without_waiting(
    x_TD: Tensor, routing_map_TE: Tensor, gates_TE: Tensor, w_up_EHD: Tensor, w_down_EDF: Tensor, most_experts: int
) -> Tensor:
    """The same with as many rows as there may be; how many there are is known on the device alone.

    A graph of CUDA can hold it, and it sums in the same order each time.
    """
    step = max(1, _MOST_ROWS // most_experts)
    parts = zip(x_TD.split(step), routing_map_TE.split(step), gates_TE.split(step), strict=True)
    return torch.cat([_part(*part, w_up_EHD, w_down_EDF, most_experts) for part in parts])


def _part(
    x_TD: Tensor, routing_map_TE: Tensor, gates_TE: Tensor, w_up_EHD: Tensor, w_down_EDF: Tensor, most_experts: int
) -> Tensor:
    num_tokens, num_experts = routing_map_TE.shape
    most_rows = num_tokens * min(most_experts, num_experts)
    ends_E = routing_map_TE.sum(dim=0).cumsum(0)
    row_TE = routing_map_TE.cumsum(dim=0) - 1 + F.pad(ends_E, (1, 0))[:-1]
    # What is not routed is written to one place more, behind the others.
    places = row_TE.masked_fill(~routing_map_TE, most_rows).flatten()
    routes = torch.arange(num_tokens * num_experts, device=x_TD.device)
    route_N = routes.new_zeros(most_rows + 1).scatter_(0, places, routes)[:-1]
    offsets_T1 = F.pad(routing_map_TE.sum(dim=1).cumsum(0), (1, 0))
    place_TE = routing_map_TE.cumsum(dim=1) - 1 + offsets_T1[:-1, None]
    places = place_TE.masked_fill(~routing_map_TE, most_rows).flatten()
    row_N = routes.new_zeros(most_rows + 1).scatter_(0, places, row_TE.flatten())[:-1]
    ends_E = ends_E.to(torch.int32)
    h_N2F = F.grouped_mm(x_TD.index_select(0, route_N // num_experts), w_up_EHD.transpose(1, 2), offs=ends_E)
    activation_NF = gated_activation(h_N2F, gates_TE.flatten().index_select(0, route_N))
    rows_ND = F.grouped_mm(activation_NF, w_down_EDF.transpose(1, 2), offs=ends_E)
    # Rows behind the last one hold anything: they are the sum of a token more, which is left out.
    offsets_T2 = F.pad(offsets_T1, (0, 1), value=most_rows)
    return F.embedding_bag(row_N, rows_ND, offsets_T2, mode="sum", include_last_offset=True)[:-1]


def _gradients(
    grad_TD: Tensor, x_TD: Tensor, routing_map_TE: Tensor, gates_TE: Tensor, w_up_EHD: Tensor, w_down_EDF: Tensor,
    of_weights: bool,
) -> Gradients:  # fmt: skip
    backend, permutation = _backend(x_TD, w_down_EDF), Permutation.of(routing_map_TE)
    # Made again, as its size is not known when a graph is made; the second product goes with it.
    _, h_N2F = backend.forward(x_TD, gates_TE, w_up_EHD, w_down_EDF, permutation)
    given = (grad_TD.contiguous(), h_N2F, x_TD, gates_TE, w_up_EHD, w_down_EDF, permutation)
    grad_x_TD, grad_gates_TE, grad_up_EHD, grad_down_EDF = backend.backward(*given, of_weights=of_weights)
    # Two outputs of an operator may not be one tensor.
    return grad_x_TD, grad_gates_TE, grad_up_EHD, grad_down_EDF if of_weights else grad_up_EHD.clone()


def _gradients_like(grad: Tensor, x: Tensor, routing_map: Tensor, gates: Tensor, up: Tensor, down: Tensor,
                    of_weights: bool) -> Gradients:  # fmt: skip
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
    forward, backward = "dynmoe::experts_1", "dynmoe::experts_gradients_1"
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
        w_down_EDF: down projections.
        most_experts: that a token may have: the room that a GPU, which is not waited for, keeps.
    """
    y_TD: Tensor = torch.ops.dynmoe.experts_1(x_TD, routing_map_TE, gates_TE, w_up_EHD, w_down_EDF, most_experts)
    return y_TD
