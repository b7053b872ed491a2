"""What budgets, adaptation and capacities need to know of a step: sums over its tokens, for each layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dynmoe.routing.expert_threshold import NUM_BINS, score_histogram
from dynmoe.routing.plan import RoutingPlan


@dataclass(frozen=True)
class ControlStatisticsSpec:
    """What is summed up in addition to tokens and loads.

    Attributes:
        deviation: of what is compared with thresholds.
        unclaimed: tokens that exceeded no threshold, and the sum of their router inputs.
        histogram: counts of scores by expert and bin.
    """

    deviation: bool = False
    unclaimed: bool = False
    histogram: bool = False


@dataclass(frozen=True)
class ControlStatistics:
    """Sums of one layer over all tokens of a step, fp64, the same on every rank.

    Attributes:
        tokens: their number, a scalar.
        selected_E: tokens that selected each expert, before capacity dropped routes.
        mean_E: of what is compared with each threshold; None without ``deviation``.
        variance_E: likewise.
        unclaimed: tokens that exceeded no expert's threshold, a scalar; None without ``unclaimed``.
        unclaimed_D: sum of the router inputs of those tokens; None without ``unclaimed``.
        histogram_EB: counts of ``score_histogram``; None without ``histogram``.
    """

    tokens: Tensor
    selected_E: Tensor
    mean_E: Tensor | None = None
    variance_E: Tensor | None = None
    unclaimed: Tensor | None = None
    unclaimed_D: Tensor | None = None
    histogram_EB: Tensor | None = None

    @property
    def experts_per_token(self) -> Tensor:
        return self.selected_E.sum() / self.tokens


@torch.no_grad()
def pack_control_statistics(
    plan: RoutingPlan, x_TD: Tensor, compared_TE: Tensor | None, spec: ControlStatisticsSpec
) -> Tensor:
    """The sums of one forward pass as a vector, fp64; vectors of micro-batches and ranks add up.

    Args:
        plan: of this rank's tokens, before capacity drops routes.
        x_TD: the router's inputs.
        compared_TE: what was compared with thresholds, where ``spec.deviation`` asks for it.
        spec: what the vector holds.
    """
    selected_TE = plan.selected_map_TE
    parts = [torch.full((1,), selected_TE.shape[0], device=x_TD.device), selected_TE.sum(dim=0)]
    if spec.deviation:
        assert compared_TE is not None
        values_TE = compared_TE.double()
        parts += [values_TE.sum(dim=0), values_TE.square().sum(dim=0)]
    if spec.unclaimed:
        assert plan.unclaimed_T is not None
        parts += [plan.unclaimed_T.sum().view(1), plan.unclaimed_T.float() @ x_TD.detach().float()]
    if spec.histogram:
        parts.append(score_histogram(plan.scores_TE).flatten())
    return torch.cat([part.double() for part in parts])


def unpack_control_statistics(vector: Tensor, num_experts: int, spec: ControlStatisticsSpec) -> ControlStatistics:
    """The sums of a vector of :func:`pack_control_statistics`, by name."""
    tokens = vector[0]
    selected_E = vector[1 : 1 + num_experts]
    rest = vector[1 + num_experts :]
    mean_E = variance_E = count = total_D = bins_EB = None
    if spec.deviation:
        sum_E, square_E, rest = rest.split([num_experts, num_experts, len(rest) - 2 * num_experts])
        mean_E = sum_E / tokens
        variance_E = (square_E / tokens - mean_E.square()).clamp(min=0.0)
    if spec.unclaimed:
        count = rest[0]
        total_D = rest[1:]
    if spec.histogram:
        bins_EB = rest.view(num_experts, NUM_BINS)
    return ControlStatistics(tokens, selected_E, mean_E, variance_E, count, total_D, bins_EB)
