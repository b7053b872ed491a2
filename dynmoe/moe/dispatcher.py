"""Sends tokens to the ranks that hold their experts, and the outputs back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from dynmoe.ops import Backend, Permutation, gather_rows, pick_backend, sum_rows
from dynmoe.ops.all_to_all import AllToAllGroup, AsyncAllToAll, exchange_routes
from dynmoe.routing import RoutingPlan


@dataclass(frozen=True)
class DispatchedTokens:
    """Tokens on the rank of their experts, and the way back for the outputs.

    Attributes:
        x_TD: each token once; after an all-to-all only a link (see :meth:`TokenDispatcher.receive`).
        gates_TE: fp32 weights of this rank's experts; 0 without a route.
        permutation: from these tokens to the rows of this rank's experts.
        routes: on the source rank, from its tokens to the routes of their plan.
        backend: computes the experts.
        exchange: the all-to-all of the tokens; None without a group.
        senders: on the source rank, from its tokens to the copies sent; None without a group.
    """

    x_TD: Tensor
    gates_TE: Tensor
    permutation: Permutation
    routes: Permutation
    backend: Backend
    exchange: AsyncAllToAll | None = None
    senders: Permutation | None = None


class TokenDispatcher:
    """Sends each token once to every rank that holds experts of its plan, and sums the outputs that come back.

    The experts are spread over ``group`` in consecutive blocks of equal size. Gates are sent separately, in eight bytes
    per route. The rank of the experts sums their outputs and returns one row for each received one. Calls are
    collective over ``group``.

    Args:
        group: ranks that hold experts; None for this rank alone.
        backend: computes the experts and builds their indices (see ``dynmoe.ops.routed_experts``).
    """

    def __init__(self, group: dist.ProcessGroup | None = None, backend: str = "auto") -> None:
        self.all_to_all_group = None if group is None else AllToAllGroup(group)
        self._backend = backend

    def count_bytes(self, counting: bool) -> None:
        """Turns counting of the bytes sent to other ranks on or off."""
        if self.all_to_all_group is not None:
            self.all_to_all_group.counting = counting

    def take_sent_bytes(self) -> int:
        """Bytes that were sent to other ranks and counted since the last call."""
        if self.all_to_all_group is None:
            return 0
        sent = self.all_to_all_group.sent_bytes
        self.all_to_all_group.sent_bytes = 0
        return sent

    def dispatch(self, x_TD: Tensor, plan: RoutingPlan, max_rows: int | None = None) -> DispatchedTokens:
        """Starts sending the tokens; work that does not need them can run before :meth:`receive`.

        ``max_rows`` bounds the routes of the plan, if a bound is known: a single rank then never waits for its GPU.
        """
        backend = pick_backend(self._backend, x_TD.device, x_TD.dtype)
        if self.all_to_all_group is None:
            permutation = backend.permutation(plan.routing_map_TE, max_rows)
            return DispatchedTokens(x_TD, plan.gates_TE, permutation, permutation, backend)
        return self._send(x_TD, plan, self.all_to_all_group, backend)

    @staticmethod
    def _send(x_TD: Tensor, plan: RoutingPlan, group: AllToAllGroup, backend: Backend) -> DispatchedTokens:
        map_TE = plan.routing_map_TE
        num_local = map_TE.shape[1] // group.num_ranks
        map_TRL = map_TE.view(len(map_TE), group.num_ranks, num_local)
        needed_TR = map_TRL.any(dim=2)
        counts_R2 = torch.stack([needed_TR.sum(dim=0), map_TRL.sum(dim=(0, 2))], dim=1)
        received_R2 = group.exchange_counts(counts_R2)
        sizes = torch.stack([counts_R2, received_R2]).cpu()  # the only wait for the device
        (send, send_routes), (receive, receive_routes) = sizes.transpose(1, 2).tolist()

        routes = backend.permutation(map_TE, sum(send_routes))
        expert_M = routes.route_N % map_TE.shape[1]
        place_TR = needed_TR.cumsum(dim=0) - 1  # of a token among those sent to the same rank
        place_M = place_TR[routes.token_N, expert_M // num_local]
        gates_M, codes_M = exchange_routes(
            routes.of_rows(plan.gates_TE), place_M * num_local + expert_M % num_local,
            group, send_routes, receive_routes,
        )  # fmt: skip
        senders = backend.permutation(needed_TR, sum(send))
        exchange = AsyncAllToAll(group, send, receive)
        link = exchange.start(gather_rows(x_TD, senders))

        # Received tokens are in rank order; the code of a route counts from the first token of its sender.
        first_R = received_R2[:, 0].cumsum(0) - received_R2[:, 0]
        codes_M = codes_M + num_local * first_R.repeat_interleave(received_R2[:, 1], output_size=len(codes_M))
        flat = gates_M.new_zeros(sum(receive) * num_local)
        received_map_TL = flat.bool().index_fill_(0, codes_M, True).view(sum(receive), num_local)
        received_gates_TL = flat.index_copy(0, codes_M, gates_M).view_as(received_map_TL)
        permutation = backend.permutation(received_map_TL, sum(receive_routes))
        return DispatchedTokens(link, received_gates_TL, permutation, routes, backend, exchange, senders)

    def receive(self, dispatched: DispatchedTokens) -> Tensor:
        """Waits for the tokens of this rank's experts."""
        if dispatched.exchange is None:
            return dispatched.x_TD
        return dispatched.exchange.finish(dispatched.x_TD)

    def combine(self, outputs_TD: Tensor, dispatched: DispatchedTokens) -> Tensor:
        """Returns the sum of the gated expert outputs of each token; 0 for a token without experts."""
        if dispatched.exchange is None:
            return outputs_TD
        assert dispatched.senders is not None
        back = dispatched.exchange.reversed()
        return sum_rows(back.finish(back.start(outputs_TD)), dispatched.senders)
