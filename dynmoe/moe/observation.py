"""What one optimizer step saw in each layer: sums over micro-batches and ranks, for whatever acts between steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from dynmoe.routing import RoutingPlan
from dynmoe.routing.expert_threshold import NUM_BINS, score_histogram

if TYPE_CHECKING:
    from dynmoe.moe.layer import MoELayer


@dataclass(frozen=True)
class Observation:
    """Sums of one layer over all tokens of a step, fp64, the same on every rank.

    Attributes:
        tokens: how many there were, a scalar.
        selected_E: tokens that selected each expert, before capacity dropped routes.
        unclaimed: tokens that no expert's threshold let in, a scalar; None unless it was asked for.
        unclaimed_D: sum of the router inputs of those tokens; None unless it was asked for.
        histogram_EB: counts of ``score_histogram``; None unless the router needs them.
    """

    tokens: Tensor
    selected_E: Tensor
    unclaimed: Tensor | None = None
    unclaimed_D: Tensor | None = None
    histogram_EB: Tensor | None = None

    @property
    def experts_per_token(self) -> Tensor:
        return self.selected_E.sum() / self.tokens


@torch.no_grad()
def observe(plan: RoutingPlan, x_TD: Tensor, *, unclaimed: bool, histogram: bool) -> Tensor:
    """One forward pass as a vector, fp64: tokens, load of each expert, and the parts that are asked for.

    Args:
        plan: of this rank's tokens, before capacity drops routes.
        x_TD: the router's inputs.
        unclaimed: count the tokens that no threshold let in, and sum their inputs.
        histogram: count scores by expert and bin.
    """
    selected_TE = plan.selected_map_TE
    parts = [torch.full((1,), selected_TE.shape[0], device=x_TD.device), selected_TE.sum(dim=0)]
    if unclaimed:
        assert plan.unclaimed_T is not None
        parts += [plan.unclaimed_T.sum().view(1), plan.unclaimed_T.float() @ x_TD.detach().float()]
    if histogram:
        parts.append(score_histogram(plan.scores_TE).flatten())
    return torch.cat([part.double() for part in parts])


def reduce_observations(
    layers: Sequence[MoELayer], group: dist.ProcessGroup | None, *, unclaimed: bool, histogram: bool
) -> list[Observation]:
    """What each layer saw since the last call, over all ranks of ``group``; one collective for all layers."""
    vectors = [layer.take_observed() for layer in layers]
    packed = torch.cat(vectors)
    if group is not None:
        dist.all_reduce(packed, group=group)
    observations = []
    for layer, vector in zip(layers, packed.split([len(vector) for vector in vectors]), strict=True):
        num_experts = layer.num_experts
        tokens, selected_E, rest = vector[0], vector[1 : 1 + num_experts], vector[1 + num_experts :]
        count, total_D = (rest[0], rest[1:]) if unclaimed else (None, None)
        bins_EB = rest.view(num_experts, NUM_BINS) if histogram else None
        observations.append(Observation(tokens, selected_E, count, total_D, bins_EB))
    return observations
