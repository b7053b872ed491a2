"""Updates of routers and experts between optimizer steps, in order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from dynmoe.config import Config
from dynmoe.moe.adaptation import Adaptation, AdaptationEvent, ParameterReset
from dynmoe.moe.budget import Budget
from dynmoe.moe.context import MoEGroups
from dynmoe.moe.layer import MoELayer
from dynmoe.moe.statistics import LayerStepStats
from dynmoe.routing.budget_rules import moving_average
from dynmoe.routing.update_statistics import UpdateStatistics, UpdateStatisticsSpec, unpack_update_statistics


class RouterUpdates:
    """Budget, adaptation, and the moving average from which capacities are computed, for all MoE layers of a model.

    Collects nothing and does nothing unless the configuration enables one of the three.

    Args:
        config: of the run.
        layers: MoE layers of this rank, in order; all ranks of the token group hold parts of the same layers.
        groups: of the layers.
        optimizer_state: resets parameters of new experts.
        device: of the model.
    """

    def __init__(
        self, config: Config, layers: Sequence[MoELayer], groups: MoEGroups, optimizer_state: ParameterReset,
        device: torch.device,
    ) -> None:  # fmt: skip
        router = config.model.router
        budget = config.budget
        self._layers = layers
        self._groups = groups
        self._budget = Budget(config, groups.pipeline, device)
        needed = max(router.min_experts_per_token, budget.experts_per_token or 0, budget.start or 0, 1)
        self._adaptation = Adaptation(config.adaptation, optimizer_state, min_active=math.ceil(needed))
        has_budget = budget.method != "none" or budget.experts_per_token is not None
        # Replayed experts do not respond to a change of thresholds, so a controller would move them without end.
        # Histograms are of the router's own scores.
        self._has_budget = has_budget and (config.train.replay is None or router.NEEDS_HISTOGRAM)
        self._has_capacity = config.model.moe.capacity_factor is not None
        self._deviation = budget.method != "none" and router.NEEDS_DEVIATION
        self._histogram = router.NEEDS_HISTOGRAM or budget.method == "quantile"
        self._calibrated = False

    @property
    def need_calibration(self) -> bool:
        """True until all thresholds are calibrated; collective over the stages of a pipeline."""
        if not self._calibrated:  # cached: the check waits for the device
            flags = [layer.router.is_calibrated for layer in self._layers]
            known = [flag for flag in flags if flag is not None]
            self._calibrated = all(self._gather_stages(not known or bool(torch.stack(known).all())))
        return not self._calibrated

    def _gather_stages(self, local: Any) -> list[Any]:
        """The values of ``local`` on all pipeline stages, in order."""
        group = self._groups.pipeline
        if group is None:
            return [local]
        values = [None] * dist.get_world_size(group)
        dist.all_gather_object(values, local, group=group)
        return values

    def spec(self, step: int) -> UpdateStatisticsSpec | None:
        """The statistics to collect in optimizer step ``step`` (from 1); None for none."""
        adapts = self._adaptation.records(step)
        if not (self._has_budget or self._has_capacity or adapts):
            return None
        return UpdateStatisticsSpec(self._deviation, adapts, self._histogram)

    def target_experts(self, step: int) -> float | None:
        """Experts per token that the budget targets in optimizer step ``step``; None without a budget."""
        return self._budget.of_step(step)

    def apply(
        self, stats: Sequence[LayerStepStats], spec: UpdateStatisticsSpec | None, step: int
    ) -> list[AdaptationEvent]:
        """Updates routers and experts from the statistics of step ``step``; collective.

        Returns:
            The removed and added experts, identical on every rank.
        """
        if spec is None:
            return []
        statistics = self._reduce(stats, spec)
        if self._has_budget:
            self._budget.update([layer.router for layer in self._layers], statistics, step)
        if self._has_capacity:
            self._update_averages(statistics)
        return self._adapt(statistics, step)

    def skip(self, spec: UpdateStatisticsSpec | None, step: int) -> list[AdaptationEvent]:
        """Replaces :meth:`apply` if step ``step`` was skipped; an adaptation window may still end. Collective."""
        return [] if spec is None else self._adapt(None, step)

    def _reduce(self, stats: Sequence[LayerStepStats], spec: UpdateStatisticsSpec) -> list[UpdateStatistics]:
        """The statistics of each layer over all ranks of the token group, in one all-reduce."""
        vectors = [layer.update_sums for layer in stats if layer.update_sums is not None]
        assert len(vectors) == len(self._layers)
        if not vectors:  # a pipeline stage of dense layers
            return []
        packed = torch.cat(vectors)
        if self._groups.tokens is not None:
            dist.all_reduce(packed, group=self._groups.tokens)
        parts = packed.split([len(vector) for vector in vectors])
        return [
            unpack_update_statistics(vector, layer.num_experts, spec)
            for layer, vector in zip(self._layers, parts, strict=True)
        ]

    def _adapt(self, statistics: Sequence[UpdateStatistics] | None, step: int) -> list[AdaptationEvent]:
        events = self._adaptation.update(self._layers, statistics, step)
        if not self._adaptation.changes_at(step):
            return events
        all_events = [event for stage in self._gather_stages(events) for event in stage]
        return sorted(all_events, key=lambda event: event.layer)

    @torch.no_grad()
    def _update_averages(self, statistics: Sequence[UpdateStatistics]) -> None:
        for layer, own in zip(self._layers, statistics, strict=True):
            average = layer.router.experts_per_token
            average.copy_(moving_average(average, own.experts_per_token.float()))
