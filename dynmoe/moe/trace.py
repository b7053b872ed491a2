"""What a routing trace keeps of the forward passes of one step on one rank: the routes, and nothing of size T x E."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dynmoe.ops import Permutation
from dynmoe.routing import RoutingPlan


@dataclass(frozen=True)
class TracedPass:
    """The routes of one layer and forward pass, on the host. A route is a flat index t * E + e, int32.

    Attributes:
        layer: index in the decoder.
        micro_batch: number of the forward pass within the step.
        num_experts: E.
        route_N: what capacity and ceiling left of the router's choice, in any order; may be longer than ``num_routes``.
        gates_N: fp32 weights of these routes.
        num_routes: of ``route_N`` in use, a scalar.
        dropped_M: what they took away, in ascending order.
    """

    layer: int
    micro_batch: int
    num_experts: int
    route_N: Tensor
    gates_N: Tensor
    num_routes: Tensor
    dropped_M: Tensor

    def sorted_routes(self) -> tuple[Tensor, Tensor]:
        """The routes by token and expert, and their gates."""
        route_N, order_N = self.route_N[: int(self.num_routes)].sort()
        return route_N, self.gates_N[order_N]


class RoutingTrace:
    """Collects the routes of a step; an engine's context holds one while a step is traced."""

    def __init__(self) -> None:
        self._passes: list[TracedPass] = []
        self._device = torch.device("cpu")

    @torch.no_grad()
    def add(self, layer: int, micro_batch: int, plan: RoutingPlan, routes: Permutation) -> None:
        """Sends the routes of a plan to the host.

        Nothing here waits for a GPU, but where capacity or a ceiling may drop routes: how many is known there only.

        Args:
            layer: index in the decoder.
            micro_batch: number of the forward pass within the step.
            plan: of this rank's tokens.
            routes: its permutation.
        """
        self._device = plan.gates_TE.device
        # What lies behind the routes that there are is not initialised.
        known_N = routes.route_N.clamp(0, plan.gates_TE.numel() - 1)
        dropped_M = known_N[:0]
        if plan.selected_map_TE is not plan.routing_map_TE:
            dropped_M = (plan.selected_map_TE & ~plan.routing_map_TE).flatten().nonzero().flatten()
        route_N, num_routes, dropped_M = (
            _to_host(indices, torch.int32) for indices in (known_N, routes.num_rows, dropped_M)
        )
        gates_N = _to_host(plan.gates_TE.flatten().index_select(0, known_N), torch.float32)
        num_experts = plan.gates_TE.shape[1]
        self._passes.append(TracedPass(layer, micro_batch, num_experts, route_N, gates_N, num_routes, dropped_M))

    def passes(self) -> list[TracedPass]:
        """By layer and micro-batch; waits for what is under way."""
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
        return sorted(self._passes, key=lambda own: (own.layer, own.micro_batch))


def _to_host(values: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy that is under way, in pinned memory, where the values come from a GPU."""
    return values.to("cpu", dtype, non_blocking=True, copy=True)
