"""Tokens to the ranks that hold their experts and back."""

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
    """Tokens on the rank of their experts, and what takes the outputs back.

    Attributes:
        x_TD: each token once; with an exchange, what stands for tokens under way (see :meth:`TokenDispatcher.receive`).
        gates_TE: fp32 weights of the experts of this rank; 0 where there is no route.
        permutation: from these tokens to the rows of this rank's experts.
        routes: on the rank that the tokens come from, from its tokens to the routes of their plan.
        backend: that computes the experts.
        exchange: the way of the tokens between ranks; None where none leaves its own.
        senders: on the rank that the tokens come from, from its tokens to the copies that were sent; None likewise.
    """

    x_TD: Tensor
    gates_TE: Tensor
    permutation: Permutation
    routes: Permutation
    backend: Backend
    exchange: AsyncAllToAll | None = None
    senders: Permutation | None = None


class TokenDispatcher:
    """Sends each token once to every rank that holds experts of its plan, and adds up what comes back.

    The experts are spread over ``group`` in consecutive blocks of equal size. A token's gates travel beside it, eight
    bytes a route; the rank of the experts adds up their outputs, so that one row goes back for each one that came. With
    a group, every rank of it must take part in every call.

    Args:
        group: ranks that hold experts; None for this one alone.
        backend: name of what computes the experts, which builds its indices too (see ``dynmoe.ops.routed_experts``).
    """

    def __init__(self, group: dist.ProcessGroup | None = None, backend: str = "auto") -> None:
        self.wire = None if group is None else AllToAllGroup(group)
        self._backend = backend

    @property
    def count_bytes(self) -> bool:
        """Whether the bytes are counted that leave this rank."""
        return self.wire is not None and self.wire.counting

    @count_bytes.setter
    def count_bytes(self, counting: bool) -> None:
        if self.wire is not None:
            self.wire.counting = counting

    def take_sent_bytes(self) -> int:
        """Bytes that left this rank, and came back from here, while they were counted; since the last call."""
        if self.wire is None:
            return 0
        sent = self.wire.sent_bytes
        self.wire.sent_bytes = 0
        return sent

    def dispatch(self, x_TD: Tensor, plan: RoutingPlan, most_rows: int | None = None) -> DispatchedTokens:
        """Sends the tokens off; what does not need them may run before :meth:`receive`.

        Args:
            x_TD: this rank's tokens.
            plan: of these tokens.
            most_rows: a bound of the plan's routes, where one is known: a single rank then never waits for its GPU.
        """
        backend = pick_backend(self._backend, x_TD.device, x_TD.dtype)
        if self.wire is None:
            permutation = backend.permutation(plan.routing_map_TE, most_rows)
            return DispatchedTokens(x_TD, plan.gates_TE, permutation, permutation, backend)
        return self._send(x_TD, plan, self.wire, backend)

    @staticmethod
    def _send(x_TD: Tensor, plan: RoutingPlan, wire: AllToAllGroup, backend: Backend) -> DispatchedTokens:
        map_TE = plan.routing_map_TE
        num_local = map_TE.shape[1] // wire.num_ranks
        map_TRL = map_TE.view(len(map_TE), wire.num_ranks, num_local)  # L: experts of one rank
        needed_TR = map_TRL.any(dim=2)
        counts_R2 = torch.stack([needed_TR.sum(dim=0), map_TRL.sum(dim=(0, 2))], dim=1)
        received_R2 = wire.exchange_counts(counts_R2)
        sizes = torch.stack([counts_R2, received_R2]).cpu()  # the one wait for the device
        (send, send_routes), (receive, receive_routes) = sizes.transpose(1, 2).tolist()

        routes = backend.permutation(map_TE, sum(send_routes))
        expert_M = routes.route_N % map_TE.shape[1]
        place_TR = needed_TR.cumsum(dim=0) - 1  # of a token among those that go to the same rank
        place_M = place_TR[routes.token_N, expert_M // num_local]
        gates_M, codes_M = exchange_routes(
            routes.of_rows(plan.gates_TE), place_M * num_local + expert_M % num_local,
            wire, send_routes, receive_routes,
        )  # fmt: skip
        senders = backend.permutation(needed_TR, sum(send))
        exchange = AsyncAllToAll(wire, send, receive)
        under_way = exchange.start(gather_rows(x_TD, senders))

        # S: tokens received, rank after rank. A route's number counts from the first one of its sender.
        first_R = received_R2[:, 0].cumsum(0) - received_R2[:, 0]
        codes_M = codes_M + num_local * first_R.repeat_interleave(received_R2[:, 1], output_size=len(codes_M))
        flat = gates_M.new_zeros(sum(receive) * num_local)
        map_SL = flat.bool().index_fill_(0, codes_M, True).view(sum(receive), num_local)
        gates_SL = flat.index_copy(0, codes_M, gates_M).view_as(map_SL)
        permutation = backend.permutation(map_SL, sum(receive_routes))
        return DispatchedTokens(under_way, gates_SL, permutation, routes, backend, exchange, senders)

    def receive(self, dispatched: DispatchedTokens) -> Tensor:
        """The tokens for this rank's experts, once they are there."""
        if dispatched.exchange is None:
            return dispatched.x_TD
        return dispatched.exchange.finish(dispatched.x_TD)

    def combine(self, outputs_TD: Tensor, dispatched: DispatchedTokens) -> Tensor:
        """Sum of the gated expert outputs of each token, [T, D]; 0 for a token without experts."""
        if dispatched.exchange is None:
            return outputs_TD
        assert dispatched.senders is not None
        back = dispatched.exchange.reversed()
        return sum_rows(back.finish(back.start(outputs_TD)), dispatched.senders)
