"""Permutation of tokens to rows sorted by expert and back: a routing map in CSR form, and two operators over it.

There is no padding and no T x E x C tensor: only the N routed rows exist. Each operator is the gradient of the other.
Both read memory row by row and sum in a fixed order, so they are deterministic on every device.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_FEW_TOKENS = 32


@dataclass(frozen=True)
class Permutation:
    """Compressed sparse rows (CSR) of a routing map, sorted by expert and by token.

    Attributes:
        token_N: token of each routed row; rows are sorted by expert, then by token.
        route_N: flat index t * E + e of each routed row into a [T, E] tensor.
        row_N: indices of the routed rows sorted by token, then by expert.
        token_offsets: start of each token in ``row_N``, followed by N: [T + 1].
        ends_E: end of each expert's rows, int32.

    For our Triton kernels the index tensors may be longer than the number of rows, to avoid a device synchronization:
    the first ``ends_E[-1]`` rows are in use, the others are uninitialized.
    """

    token_N: Tensor
    route_N: Tensor
    row_N: Tensor
    token_offsets: Tensor
    ends_E: Tensor

    @classmethod
    def of(cls, routing_map_TE: Tensor) -> Permutation:
        """Builds the index tensors of a bool [T, E] map (True: routed) with exactly N rows.

        Synchronizes with a GPU; the Triton kernels use ``dynmoe.ops.triton.routes`` instead.
        """
        num_tokens, num_experts = routing_map_TE.shape
        if num_tokens <= _FEW_TOKENS and routing_map_TE.device.type == "cpu":
            return cls._of_few(routing_map_TE)
        expert_N, token_N = routing_map_TE.t().nonzero(as_tuple=True)
        tokens_per_expert_E = routing_map_TE.sum(dim=0)
        experts_per_token_T = routing_map_TE.sum(dim=1)
        # Row of (t, e): all rows of the experts before e, plus the tokens of e before t.
        ends_E = tokens_per_expert_E.cumsum(0)
        row_TE = routing_map_TE.cumsum(dim=0) - 1 + (ends_E - tokens_per_expert_E)
        token_offsets = F.pad(experts_per_token_T.cumsum(0), (1, 0))
        return cls(
            token_N=token_N,
            route_N=token_N * num_experts + expert_N,
            row_N=row_TE[routing_map_TE],
            token_offsets=token_offsets,
            ends_E=ends_E.to(torch.int32),
        )

    @classmethod
    def _of_few(cls, routing_map_TE: Tensor) -> Permutation:
        """``of`` for few tokens, where the overhead of each call dominates: NumPy's is a third of PyTorch's."""
        map_TE = routing_map_TE.numpy()
        if len(map_TE) == 1:  # the common case in generation
            (routes,) = map_TE[0].nonzero()
            zeros_N, places_N, offsets = _indices_of_one(len(routes))
            ends_E = torch.from_numpy(map_TE[0].cumsum(dtype=np.int32))
            return cls(zeros_N, torch.from_numpy(routes), places_N, offsets, ends_E)
        expert_N, token_N = (np.ascontiguousarray(index_N) for index_N in map_TE.T.nonzero())
        token_offsets = np.zeros(len(map_TE) + 1, np.int64)
        map_TE.sum(axis=1).cumsum(out=token_offsets[1:])
        return cls(
            token_N=torch.from_numpy(token_N),
            route_N=torch.from_numpy(token_N * map_TE.shape[1] + expert_N),
            row_N=torch.from_numpy(token_N.argsort(kind="stable")),
            token_offsets=torch.from_numpy(token_offsets),
            ends_E=torch.from_numpy(map_TE.sum(axis=0).cumsum(dtype=np.int32)),
        )

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All fields in order, for ``save_for_backward``."""
        return self.token_N, self.route_N, self.row_N, self.token_offsets, self.ends_E

    @property
    def num_rows(self) -> Tensor:
        """Number of rows in use, an int32 scalar on the device."""
        return self.ends_E[-1]

    def of_rows(self, values_TE: Tensor) -> Tensor:
        """Gathers the entries of the routed rows, [N]."""
        return values_TE.flatten().index_select(0, self.route_N)

    def of_routes(self, values_N: Tensor, like_TE: Tensor) -> Tensor:
        """Scatters values of rows into a [T, E] tensor, 0 where nothing is routed."""
        return torch.zeros_like(like_TE).flatten().index_copy_(0, self.route_N, values_N).view_as(like_TE)


@cache
@torch.inference_mode(False)  # a later backward pass may save them
def _indices_of_one(num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """``token_N``, ``row_N`` and ``token_offsets`` of one token; shared, never written to."""
    return torch.zeros(num_rows, dtype=torch.int64), torch.arange(num_rows), torch.tensor([0, num_rows])


def gather(x_TD: Tensor, permutation: Permutation) -> Tensor:
    """:func:`gather_rows` without autograd, for use inside autograd functions."""
    return x_TD.index_select(0, permutation.token_N)


def scatter_sum(rows_ND: Tensor, permutation: Permutation) -> Tensor:
    """:func:`sum_rows` without autograd, for use inside autograd functions."""
    if rows_ND.shape[0] == 0:  # embedding_bag needs at least one row
        return rows_ND.new_zeros(permutation.token_offsets.shape[0] - 1, rows_ND.shape[1])
    return F.embedding_bag(permutation.row_N, rows_ND, permutation.token_offsets, mode="sum", include_last_offset=True)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, permutation: Permutation) -> Tensor:
        ctx.save_for_backward(*permutation.tensors)
        return gather(x_TD, permutation)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return scatter_sum(grad_ND.contiguous(), Permutation(*ctx.saved_tensors)), None


class _SumRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_ND: Tensor, permutation: Permutation) -> Tensor:
        ctx.save_for_backward(*permutation.tensors)
        return scatter_sum(rows_ND, permutation)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gather(grad_TD, Permutation(*ctx.saved_tensors)), None


def gather_rows(x_TD: Tensor, permutation: Permutation) -> Tensor:
    """Copies each token to the rows of its experts, [N, D], sorted by expert. Saves indices only."""
    return _GatherRows.apply(x_TD, permutation)


def sum_rows(rows_ND: Tensor, permutation: Permutation) -> Tensor:
    """Adds up the rows of each token, [T, D]; 0 for a token without rows. Saves indices only."""
    return _SumRows.apply(rows_ND, permutation)
