"""What happens to routers and experts between optimizer steps, in the order in which it happens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from dynmoe.config import Config
from dynmoe.moe.adaptation import Adaptation, AdaptationEvent, ParameterRenewal
from dynmoe.moe.budget import Budget
from dynmoe.moe.context import MoEGroups
from dynmoe.moe.layer import MoELayer
from dynmoe.moe.statistics import LayerStepStats
from dynmoe.routing.control import moving_average
from dynmoe.routing.control_statistics import ControlStatistics, ControlStatisticsSpec, unpack_control_statistics


class RouterUpdates:
    """Budget, adaptation and the average that capacities are computed from, for all MoE layers of a model.

    Does nothing, and costs nothing, unless the configuration asks for one of the three.

    Args:
        config: of the run.
        layers: that this rank holds, in order; all ranks of the token group hold parts of the same ones.
        groups: of the layers.
        renewal: puts fresh weights in place of an expert's.
        device: of the model; a pipeline stage may hold no layer that would tell.
    """

    def __init__(
        self,
        config: Config,
        layers: Sequence[MoELayer],
        groups: MoEGroups,
        renewal: ParameterRenewal,
        device: torch.device,
    ) -> None:
        router = config.model.router
        budget = config.budget
        self._layers = layers
        self._groups = groups
        self._budget = Budget(budget, groups.pipeline, device)
        needed = max(router.min_experts_per_token, budget.experts_per_token or 0, budget.start or 0, 1)
        self._adaptation = Adaptation(config.adaptation, renewal, keep=math.ceil(needed))
        self._holds = budget.method != "none" or budget.experts_per_token is not None
        self._averages = config.model.moe.capacity_factor is not None
        self._deviation = budget.method != "none" and router.NEEDS_DEVIATION
        self._histogram = router.NEEDS_HISTOGRAM
        self._calibrated = False

    @property
    def need_calibration(self) -> bool:
        """Whether thresholds are still to be set from first scores; collective over the stages of a pipeline."""
        if not self._calibrated:  # asked once: the answer waits for the device
            flags = [layer.router.is_calibrated for layer in self._layers]
            known = [flag for flag in flags if flag is not None]
            self._calibrated = all(self._of_all_stages(not known or bool(torch.stack(known).all())))
        return not self._calibrated

    def _of_all_stages(self, own: Any) -> list[Any]:
        """What each pipeline stage has to say, in order."""
        group = self._groups.pipeline
        if group is None:
            return [own]
        everything = [None] * dist.get_world_size(group)
        dist.all_gather_object(everything, own, group=group)
        return everything

    def wanted(self, step: int) -> ControlStatisticsSpec | None:
        """What the passes of optimizer step ``step`` (from 1 on) are to collect; None for nothing."""
        records = self._adaptation.records(step)
        if not (self._holds or self._averages or records):
            return None
        return ControlStatisticsSpec(self._deviation, records, self._histogram)

    def target_experts(self, step: int) -> float:
        """Experts per token that the budget asks for in optimizer step ``step``; 1 without a budget."""
        return self._budget.target(step - 1) or 1.0

    def apply(
        self, stats: Sequence[LayerStepStats], spec: ControlStatisticsSpec | None, step: int
    ) -> list[AdaptationEvent]:
        """Acts on what the layers counted in step ``step``; collective.

        Returns:
            The experts that were removed and added, the same on every rank.
        """
        if spec is None:
            return []
        seen = self._reduce(stats, spec)
        if self._holds:
            self._budget.update([layer.router for layer in self._layers], seen, step)
        if self._averages:
            self._average(seen)
        return self._adapt(seen, step)

    def skip(self, spec: ControlStatisticsSpec | None, step: int) -> list[AdaptationEvent]:
        """Step ``step`` was skipped, but a window of adaptation may end with it; collective."""
        return [] if spec is None else self._adapt(None, step)

    def _reduce(self, stats: Sequence[LayerStepStats], spec: ControlStatisticsSpec) -> list[ControlStatistics]:
        """What each layer counted, over all ranks of the token group; one collective for all layers."""
        vectors = [own.control for own in stats if own.control is not None]
        assert len(vectors) == len(self._layers)
        if not vectors:  # a pipeline stage of dense layers
            return []
        packed = torch.cat(vectors)
        if self._groups.tokens is not None:
            dist.all_reduce(packed, group=self._groups.tokens)
        parts = packed.split([len(vector) for vector in vectors])
        return [
            unpack_control_statistics(vector, layer.num_experts, spec)
            for layer, vector in zip(self._layers, parts, strict=True)
        ]

    def _adapt(self, seen: Sequence[ControlStatistics] | None, step: int) -> list[AdaptationEvent]:
        events = self._adaptation.update(self._layers, seen, step)
        if not self._adaptation.changes_at(step):
            return events
        everywhere = [event for stage in self._of_all_stages(events) for event in stage]
        return sorted(everywhere, key=lambda event: event.layer)

    @torch.no_grad()
    def _average(self, seen: Sequence[ControlStatistics]) -> None:
        for layer, own in zip(self._layers, seen, strict=True):
            average = layer.router.experts_per_token
            average.copy_(moving_average(average, own.experts_per_token.float()))
