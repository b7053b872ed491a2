"""Sums over the tokens of a step and layer, from which budgets, adaptation and capacities are computed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dynmoe.routing.plan import RoutingPlan


@dataclass(frozen=True)
class UpdateStatisticsSpec:
    """The sums to collect in addition to tokens and loads.

    Attributes:
        deviation: mean and variance of the values that are compared with thresholds (``RouterSpec.compared_TE``).
        unclaimed: number of tokens that exceed no threshold, and the sum of their router inputs.
        histogram: counts by expert and bin (:meth:`RouterSpec.histogram_EC`).
    """

    deviation: bool = False
    unclaimed: bool = False
    histogram: bool = False


@dataclass(frozen=True)
class UpdateStatistics:
    """Statistics of one layer over all tokens of a step, fp64, identical on every rank.

    Attributes:
        tokens: number of tokens, a scalar.
        selected_E: tokens that selected each expert, before capacity drops routes.
        mean_E: mean of the values that are compared with each threshold; None without ``deviation``.
        variance_E: variance of these values.
        unclaimed: number of tokens that exceed no threshold, a scalar; None without ``unclaimed``.
        unclaimed_D: sum of the router inputs of these tokens.
        histogram_EC: sum of the histograms; None without ``histogram``.
    """

    tokens: Tensor
    selected_E: Tensor
    mean_E: Tensor | None = None
    variance_E: Tensor | None = None
    unclaimed: Tensor | None = None
    unclaimed_D: Tensor | None = None
    histogram_EC: Tensor | None = None

    @property
    def experts_per_token(self) -> Tensor:
        return self.selected_E.sum() / self.tokens


@torch.no_grad()
def pack_update_statistics(
    plan: RoutingPlan, x_TD: Tensor, compared_TE: Tensor | None, spec: UpdateStatisticsSpec,
    histogram_EC: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The sums of one forward pass as an fp64 vector; vectors of micro-batches and ranks can be added.

    Args:
        plan: of this rank's tokens, before capacity drops routes.
        x_TD: inputs of the router.
        compared_TE: values that were compared with thresholds; needed if ``spec.deviation``.
        spec: the sums to collect.
        histogram_EC: of this rank's tokens; needed if ``spec.histogram``.
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
        assert histogram_EC is not None
        parts.append(histogram_EC.flatten())
    return torch.cat([part.double() for part in parts])


def unpack_update_statistics(vector: Tensor, num_experts: int, spec: UpdateStatisticsSpec) -> UpdateStatistics:
    """The statistics in a (summed) vector of :func:`pack_update_statistics`."""
    tokens = vector[0]
    selected_E = vector[1 : 1 + num_experts]
    rest = vector[1 + num_experts :]
    mean_E = variance_E = count = total_D = histogram_EC = None
    if spec.deviation:
        sum_E, square_E, rest = rest.split([num_experts, num_experts, len(rest) - 2 * num_experts])
        mean_E = sum_E / tokens
        variance_E = (square_E / tokens - mean_E.square()).clamp(min=0.0)
    if spec.unclaimed:
        count = rest[0]
        total_D = rest[1:]
    if spec.histogram:
        histogram_EC = rest.view(num_experts, -1)
    return UpdateStatistics(tokens, selected_E, mean_E, variance_E, count, total_D, histogram_EC)
