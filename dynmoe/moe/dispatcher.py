"""Tokens to their experts and back, within one rank or by all-to-all between ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from dynmoe.ops import Permutation, all_to_all_rows, exchange_counts, gather_rows, permute_rows, sum_rows
from dynmoe.routing import RoutingPlan


@dataclass(frozen=True)
class Exchange:
    """The way of the rows between ranks: rows sent to and received from each, and their order by local expert."""

    send: list[int]
    receive: list[int]
    order_N: Tensor
    inverse_N: Tensor


@dataclass(frozen=True)
class DispatchedRows:
    """Rows for the experts of this rank, and what takes them back.

    Attributes:
        x: inputs of the rows, sorted by local expert; where no row leaves its rank the tokens themselves, which the
            experts copy to their rows.
        gates_N: fp32 weight of each row.
        tokens_per_expert_E: rows of each local expert, int64.
        permutation: between tokens and rows on the rank that they come from.
        exchange: None where no row leaves its rank.
    """

    x: Tensor
    gates_N: Tensor
    tokens_per_expert_E: Tensor
    permutation: Permutation
    exchange: Exchange | None


class TokenDispatcher:
    """Sends each token to the experts of its plan and adds up what comes back.

    The experts are spread over ``group`` in consecutive blocks of equal size. Splits are as uneven as the routing: no
    row is sent twice and none is padding. With a group, every rank of it must take part in every call.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group

    def dispatch(self, x_TD: Tensor, plan: RoutingPlan) -> DispatchedRows:
        permutation = Permutation.of(plan.routing_map_TE)
        # Gates go with the rows: an expert that applies them needs no second pass for their gradient.
        gates_N = plan.gates_TE.flatten().index_select(0, permutation.route_N)
        if self.group is None:
            return DispatchedRows(x_TD, gates_N, permutation.tokens_per_expert_E, permutation, None)
        exchange, tokens_per_expert_E = self._plan_exchange(permutation.tokens_per_expert_E, self.group)
        rows_ND = all_to_all_rows(gather_rows(x_TD, permutation), exchange.send, exchange.receive, self.group)
        gates_N = all_to_all_rows(gates_N, exchange.send, exchange.receive, self.group)
        rows_ND = permute_rows(rows_ND, exchange.order_N, exchange.inverse_N)
        gates_N = permute_rows(gates_N, exchange.order_N, exchange.inverse_N)
        return DispatchedRows(rows_ND, gates_N, tokens_per_expert_E, permutation, exchange)

    def combine(self, outputs_ND: Tensor, dispatched: DispatchedRows) -> Tensor:
        """Sum of the gated expert outputs of each token, [T, D]; 0 for a token without experts."""
        exchange = dispatched.exchange
        if exchange is not None:
            assert self.group is not None
            outputs_ND = permute_rows(outputs_ND, exchange.inverse_N, exchange.order_N)
            outputs_ND = all_to_all_rows(outputs_ND, exchange.receive, exchange.send, self.group)
        return sum_rows(outputs_ND, dispatched.permutation)

    @staticmethod
    def _plan_exchange(sent_E: Tensor, group: dist.ProcessGroup) -> tuple[Exchange, Tensor]:
        sent_RE = sent_E.view(dist.get_world_size(group), -1)
        received_RE = exchange_counts(sent_RE, group)
        send, receive = torch.stack([sent_RE.sum(dim=1), received_RE.sum(dim=1)]).tolist()  # the one host sync
        # Received rows are sorted by (source rank, local expert); the experts want (local expert, source rank).
        num_ranks, num_local = received_RE.shape
        expert_of_block = torch.arange(num_local, device=sent_E.device).repeat(num_ranks)
        expert_N = expert_of_block.repeat_interleave(received_RE.flatten(), output_size=sum(receive))
        order_N = expert_N.argsort(stable=True)
        inverse_N = torch.empty_like(order_N).scatter_(0, order_N, torch.arange(len(order_N), device=sent_E.device))
        return Exchange(send, receive, order_N, inverse_N), received_RE.sum(dim=0)
