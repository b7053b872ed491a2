"""Backends that compute routed SwiGLU experts: each has the same ``forward`` and ``backward``, without autograd.

``forward`` returns the output and the up projection h, the only activation that ``backward`` needs besides its inputs.
``backward`` returns the gradients of tokens, gates and weights, and may overwrite h. If a sum of a weight's gradients
is given, it adds to that instead. The gate scales the activation before the down projection. Its gradient is then
<dO · W_down^T, a>, so the experts' outputs need not be saved.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from dynmoe.ops.permute import Permutation, gather, scatter_sum
from dynmoe.ops.swiglu import gated_activation, gated_activation_backward

Gradients = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
# For each of the two weights: a tensor of its shape to which its gradient is added.
Sums = tuple[Tensor | None, Tensor | None]
Product = Callable[[Tensor, Tensor, Tensor], Tensor]
ActivationBackward = Callable[[Tensor, Tensor, Tensor], Tensor]


class KernelBackend(Protocol):
    """Gathers tokens into rows, multiplies them by the experts' weights, and sums the rows of each token."""

    @property
    def name(self) -> str: ...

    def permutation(self, routing_map_TE: Tensor, max_rows: int | None = None) -> Permutation:
        """Builds the permutation from tokens to rows; ``max_rows``: N or an upper bound, if the host knows one."""

    def forward(
        self, x_TD: Tensor, gates_TE: Tensor, w_up_EHD: Tensor, w_down_EDF: Tensor, permutation: Permutation
    ) -> tuple[Tensor, Tensor]:
        """Returns the output [T, D] and h [N, H], with rows sorted by expert."""

    def backward(
        self,
        grad_TD: Tensor,
        h_NH: Tensor,
        x_TD: Tensor,
        gates_TE: Tensor,
        w_up_EHD: Tensor,
        w_down_EDF: Tensor,
        permutation: Permutation,
        *,
        of_weights: bool = True,
        sums: Sums = (None, None),
    ) -> Gradients:
        """Returns the gradients of x, gates and both weights; overwrites ``h_NH``.

        The gradient of a weight is None if ``of_weights`` is false (frozen weights), or if it was added to its sum.
        """


def grouped_mm(a: Tensor, b: Tensor, offsets_E: Tensor) -> Tensor:
    """Multiplies groups of rows with PyTorch's grouped GEMM: group e is ``offsets_E[e-1]`` to ``offsets_E[e]`` (int32).

    Args:
        a: [N, J], or [I, N] if the groups split the contraction (weight gradients).
        b: [E, J, I], or [N, J].

    Returns:
        [N, I]; or [E, I, J], zero for empty groups.
    """
    if a.shape[1 if b.dim() == 2 else 0] == 0:  # the kernel rejects empty operands
        shape = (offsets_E.shape[0], a.shape[0], b.shape[1]) if b.dim() == 2 else (0, b.shape[2])
        return a.new_zeros(shape)
    if a.device.type == "cpu" and b.dim() == 3 and a.shape[0] < 4 * b.shape[0]:
        return looped_mm(a, b, offsets_E)  # PyTorch also multiplies empty groups, and with few rows most are empty
    return F.grouped_mm(a, b, offs=offsets_E)


def looped_mm(a: Tensor, b: Tensor, offsets_E: Tensor) -> Tensor:
    """:func:`grouped_mm` with one product for each group: any dtype and stride; synchronizes with the device."""
    if b.dim() == 3:
        out = a.new_empty(a.shape[0], b.shape[2])
        for expert, rows in _groups(offsets_E):
            torch.mm(a[rows], b[expert], out=out[rows])
        return out
    out = a.new_zeros(len(offsets_E), a.shape[0], b.shape[1])
    for expert, rows in _groups(offsets_E):
        torch.mm(a[:, rows], b[rows], out=out[expert])
    return out


def _groups(offsets_E: Tensor) -> list[tuple[int, slice]]:
    """The groups that have rows."""
    ends = [0, *offsets_E.tolist()]
    return [(e, slice(*pair)) for e, pair in enumerate(pairwise(ends)) if pair[0] < pair[1]]


def _add_products(total_EIJ: Tensor, a_IN: Tensor, b_NJ: Tensor, offsets_E: Tensor) -> None:
    """Adds the product of each group of rows to its matrix; no more than one product is in memory."""
    for expert, rows in _groups(offsets_E):
        if total_EIJ.dtype == a_IN.dtype:
            total_EIJ[expert].addmm_(a_IN[:, rows], b_NJ[rows])
        else:
            total_EIJ[expert].add_(a_IN[:, rows] @ b_NJ[rows])


def _one_token(
    x_1D: Tensor, gates_1E: Tensor, w_up_EHD: Tensor, w_down_EDF: Tensor, permutation: Permutation
) -> tuple[Tensor, Tensor]:
    """``PackedBackend.forward`` for one token, as in generation, where the overhead of each call matters."""
    experts = permutation.route_N.tolist()
    h_NH = torch.cat([F.linear(x_1D, w_up_EHD[expert]) for expert in experts])
    activation_NF = gated_activation(h_NH, permutation.of_rows(gates_1E))
    split = zip(activation_NF.split(1), experts, strict=True)
    rows = [F.linear(row_1F, w_down_EDF[expert]) for row_1F, expert in split]
    return torch.cat(rows).sum(dim=0, keepdim=True), h_NH


class PackedBackend:
    """Grouped products over the routed rows, built on ``product``.

    Args:
        always: whether ``product`` computes every product. Otherwise a CPU takes shorter ways to the same results.
    """

    def __init__(
        self,
        name: str,
        product: Product,
        activation_backward: ActivationBackward = gated_activation_backward,
        *,
        always: bool = False,
    ) -> None:
        self.name = name
        self._product = product
        self._activation_backward = activation_backward
        self._always = always

    def permutation(self, routing_map_TE: Tensor, max_rows: int | None = None) -> Permutation:
        """Counts the rows exactly, whatever the bound: PyTorch's products and sums process every allocated row."""
        return Permutation.of(routing_map_TE)

    def forward(
        self, x_TD: Tensor, gates_TE: Tensor, w_up_EHD: Tensor, w_down_EDF: Tensor, permutation: Permutation
    ) -> tuple[Tensor, Tensor]:
        if len(x_TD) == 1 and self._takes_shortcuts(x_TD) and len(permutation.route_N) > 0:
            return _one_token(x_TD, gates_TE, w_up_EHD, w_down_EDF, permutation)
        ends_E = permutation.ends_E
        h_NH = self._product(gather(x_TD, permutation), w_up_EHD.transpose(1, 2), ends_E)
        activation_NF = gated_activation(h_NH, permutation.of_rows(gates_TE))
        rows_ND = self._product(activation_NF, w_down_EDF.transpose(1, 2), ends_E)
        return scatter_sum(rows_ND, permutation), h_NH

    def backward(
        self,
        grad_TD: Tensor,
        h_NH: Tensor,
        x_TD: Tensor,
        gates_TE: Tensor,
        w_up_EHD: Tensor,
        w_down_EDF: Tensor,
        permutation: Permutation,
        *,
        of_weights: bool = True,
        sums: Sums = (None, None),
    ) -> Gradients:
        ends_E = permutation.ends_E
        sum_up_EHD, sum_down_EDF = sums
        grad_ND = gather(grad_TD, permutation)
        grad_NF = self._product(grad_ND, w_down_EDF, ends_E)
        grad_gates_N = self._activation_backward(h_NH, permutation.of_rows(gates_TE), grad_NF)
        grad_h_NH = h_NH
        activation_NF = grad_NF  # both were written in place
        grad_up_EHD = grad_down_EDF = None
        if of_weights:
            grad_down_EDF = self._weights_product(grad_ND.t(), activation_NF, ends_E, sum_down_EDF)
        del grad_ND, grad_NF, activation_NF  # frees memory for the large weight gradients
        if of_weights:
            grad_up_EHD = self._weights_product(grad_h_NH.t(), gather(x_TD, permutation), ends_E, sum_up_EHD)
        grad_x_TD = scatter_sum(self._product(grad_h_NH, w_up_EHD, ends_E), permutation)
        return grad_x_TD, permutation.of_routes(grad_gates_N, gates_TE), grad_up_EHD, grad_down_EDF

    def _weights_product(self, a_IN: Tensor, b_NJ: Tensor, ends_E: Tensor, total_EIJ: Tensor | None) -> Tensor | None:
        """Returns the gradient of a weight, or adds it to ``total_EIJ``."""
        if total_EIJ is None:
            return self._product(a_IN, b_NJ, ends_E)
        if self._takes_shortcuts(total_EIJ):
            _add_products(total_EIJ, a_IN, b_NJ, ends_E)
        else:  # one launch for all experts
            total_EIJ.add_(self._product(a_IN, b_NJ, ends_E))
        return None

    def _takes_shortcuts(self, operand: Tensor) -> bool:
        return operand.device.type == "cpu" and not self._always
