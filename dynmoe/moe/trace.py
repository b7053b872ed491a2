"""What a routing trace keeps of the forward passes of one step on one rank."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dynmoe.routing import RoutingPlan


@dataclass(frozen=True)
class TracedPass:
    """The plan of one layer and forward pass, on the host.

    Attributes:
        layer: index in the decoder.
        micro_batch: number of the forward pass within the step.
        selected_map_TE: bool; what the router chose.
        routing_map_TE: bool; what capacity and ceiling left of it.
        gates_TE: fp32 weights; 0 where ``routing_map_TE`` is False.
    """

    layer: int
    micro_batch: int
    selected_map_TE: Tensor
    routing_map_TE: Tensor
    gates_TE: Tensor


class RoutingTrace:
    """Collects the plans of a step; an engine's context holds one while a step is traced."""

    def __init__(self) -> None:
        self.passes: list[TracedPass] = []

    @torch.no_grad()
    def add(self, layer: int, micro_batch: int, plan: RoutingPlan) -> None:
        maps = (plan.selected_map_TE.cpu(), plan.routing_map_TE.cpu(), plan.gates_TE.detach().float().cpu())
        self.passes.append(TracedPass(layer, micro_batch, *maps))
