"""The routes of the forward passes of one step on one rank, without tensors of size T x E."""

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
        micro_batch: index of the forward pass within the step.
        num_experts: E.
        route_N: the routes after capacity and limits, in any order; only the first ``num_routes`` are valid.
        gates_N: fp32 weights of these routes.
        num_routes: a scalar.
        dropped_M: the routes that capacity and limits dropped, in ascending order.
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
    """Collects the routes of a step; part of :class:`StepState` while a step is traced."""

    def __init__(self) -> None:
        self._passes: list[TracedPass] = []
        self._device = torch.device("cpu")

    @torch.no_grad()
    def add(self, layer: int, micro_batch: int, plan: RoutingPlan, routes: Permutation) -> None:
        """Starts copying the routes of ``plan`` to the host; ``routes`` is its permutation.

        Waits for a GPU only if a capacity or limit can drop routes, because their number is known only there.
        """
        self._device = plan.gates_TE.device
        # Entries past the last route are uninitialized.
        route_N = routes.route_N.clamp(0, plan.gates_TE.numel() - 1)
        gates_N = plan.gates_TE.flatten().index_select(0, route_N)
        dropped_M = route_N[:0]
        if plan.selected_map_TE is not plan.routing_map_TE:
            dropped_M = (plan.selected_map_TE & ~plan.routing_map_TE).flatten().nonzero().flatten()
        self._passes.append(
            TracedPass(
                layer, micro_batch, plan.gates_TE.shape[1], _to_host(route_N, torch.int32),
                _to_host(gates_N, torch.float32), _to_host(routes.num_rows, torch.int32),
                _to_host(dropped_M, torch.int32),
            )
        )  # fmt: skip

    def passes(self) -> list[TracedPass]:
        """The traced passes by layer and micro-batch; waits for pending copies."""
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
        return sorted(self._passes, key=lambda traced: (traced.layer, traced.micro_batch))


def _to_host(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Starts a copy to the host, in pinned memory if the values are on a GPU."""
    return values.to("cpu", dtype, non_blocking=True, copy=True)
