"""What one optimizer step saw in each layer: sums over micro-batches and ranks, for whatever acts between steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from dynmoe.routing import RoutingPlan
from dynmoe.routing.expert_threshold import NUM_BINS, score_histogram

if TYPE_CHECKING:
    from dynmoe.moe.layer import MoELayer
    from dynmoe.moe.routers import Router


@dataclass(frozen=True)
class Observation:
    """Sums of one layer over all tokens of a step, fp64, the same on every rank.

    Attributes:
        tokens: how many there were, a scalar.
        selected_E: tokens that selected each expert, before capacity dropped routes.
        mean_E: of what was compared with each threshold; None unless it was asked for.
        variance_E: of that, by expert; None unless it was asked for.
        unclaimed: tokens that no expert's threshold let in, a scalar; None unless it was asked for.
        unclaimed_D: sum of the router inputs of those tokens; None unless it was asked for.
        histogram_EB: counts of ``score_histogram``; None unless the router needs them.
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


@dataclass(frozen=True)
class Wanted:
    """What is to be observed besides tokens and loads.

    Attributes:
        compared: mean and variance of what is compared with thresholds, for a router that ``compares``.
        unclaimed: the tokens that no threshold let in, and the sum of their inputs.
        histogram: counts of scores by expert and bin.
    """

    compared: bool = False
    unclaimed: bool = False
    histogram: bool = False


@torch.no_grad()
def observe(router: Router, plan: RoutingPlan, x_TD: Tensor, wanted: Wanted) -> Tensor:
    """One forward pass as a vector, fp64: tokens, load of each expert, and the parts that are wanted.

    Args:
        router: that made the plan.
        plan: of this rank's tokens, before capacity drops routes.
        x_TD: the router's inputs.
        wanted: the parts.
    """
    selected_TE = plan.selected_map_TE
    parts = [torch.full((1,), selected_TE.shape[0], device=x_TD.device), selected_TE.sum(dim=0)]
    if wanted.compared:
        values_TE = router.compared_TE(plan).double()
        parts += [values_TE.sum(dim=0), values_TE.square().sum(dim=0)]
    if wanted.unclaimed:
        assert plan.unclaimed_T is not None
        parts += [plan.unclaimed_T.sum().view(1), plan.unclaimed_T.float() @ x_TD.detach().float()]
    if wanted.histogram:
        parts.append(score_histogram(plan.scores_TE).flatten())
    return torch.cat([part.double() for part in parts])


def reduce_observations(
    layers: Sequence[MoELayer], group: dist.ProcessGroup | None, wanted: Wanted
) -> list[Observation]:
    """What each layer saw since the last call, over all ranks of ``group``; one collective for all layers."""
    if not layers:  # a pipeline stage of dense layers
        return []
    vectors = [layer.take_observed() for layer in layers]
    packed = torch.cat(vectors)
    if group is not None:
        dist.all_reduce(packed, group=group)
    parts = packed.split([len(vector) for vector in vectors])
    return [read_observation(vector, layer.num_experts, wanted) for layer, vector in zip(layers, parts, strict=True)]


def read_observation(vector: Tensor, num_experts: int, wanted: Wanted) -> Observation:
    """The parts of a vector of :func:`observe`, by name."""
    tokens, selected_E, rest = vector[0], vector[1 : 1 + num_experts], vector[1 + num_experts :]
    mean_E = variance_E = count = total_D = bins_EB = None
    if wanted.compared:
        sum_E, square_E, rest = rest.split([num_experts, num_experts, len(rest) - 2 * num_experts])
        mean_E = sum_E / tokens
        variance_E = (square_E / tokens - mean_E.square()).clamp(min=0.0)
    if wanted.unclaimed:
        count, total_D = rest[0], rest[1:]
    if wanted.histogram:
        bins_EB = rest.view(num_experts, NUM_BINS)
    return Observation(tokens, selected_E, mean_E, variance_E, count, total_D, bins_EB)


@contextmanager
def keeping_plans(layers: Sequence[MoELayer]) -> Iterator[list[RoutingPlan]]:
    """The plans that the routers of these layers make meanwhile, in their order; their reader may clear the list."""
    plans: list[RoutingPlan] = []
    hooks = [layer.router.register_forward_hook(lambda module, inputs, plan: plans.append(plan)) for layer in layers]
    try:
        yield plans
    finally:
        for hook in hooks:
            hook.remove()
