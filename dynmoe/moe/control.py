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
from dynmoe.moe.context import MoEContext
from dynmoe.moe.layer import MoELayer
from dynmoe.moe.observation import Observation, Wanted, reduce_observations
from dynmoe.moe.routers import ROUTERS, ThresholdRouter
from dynmoe.routing.control import moving_average


class RoutingControl:
    """Budget, adaptation and the average behind capacities, for all MoE layers of a model.

    An engine calls :meth:`begin_step` before the forward passes of an optimizer step and :meth:`end_step` after the
    optimizer's update; in between the layers collect what is needed. Does nothing, and costs nothing, unless the
    configuration asks for one of the three.

    Args:
        config: of the run.
        layers: that this rank holds, in order; all ranks of a token group hold parts of the same ones.
        context: shared by the layers.
        renewal: puts fresh weights in place of an expert's.
        device: of the model; a pipeline stage may hold no layer that would tell.
    """

    def __init__(
        self,
        config: Config,
        layers: Sequence[MoELayer],
        context: MoEContext,
        renewal: ParameterRenewal,
        device: torch.device,
    ) -> None:
        router, budget = config.model.router, config.budget
        self._layers, self._context = layers, context
        self._budget = Budget(budget, context.pipeline_group, device)
        needed = max(router.options.min_experts, budget.experts_per_token or 0, budget.start or 0, 1)
        self._adaptation = Adaptation(config.adaptation, renewal, keep=math.ceil(needed))
        self._holds = budget.method != "none" or budget.experts_per_token is not None
        self._averages = config.model.moe.capacity_factor is not None
        self._calibrated = False
        self._moves_thresholds = budget.method != "none" and ROUTERS[router.kind].compares
        self._histogram = ROUTERS[router.kind].needs_histogram

    @property
    def needs_calibration(self) -> bool:
        """Thresholds are still to be set from first scores: a forward pass with ``context.calibrating`` does it.

        Collective over the stages of a pipeline, which make that pass together.
        """
        if not self._calibrated:  # asked once: the answer waits for the device
            routers = [layer.router for layer in self._layers]
            flags = [router.calibrated for router in routers if isinstance(router, ThresholdRouter)]
            own = not flags or bool(torch.stack(flags).all())
            self._calibrated = all(self._of_all_stages(own))
        return not self._calibrated

    def _of_all_stages(self, own: Any) -> list[Any]:
        """What each pipeline stage has to say, in order."""
        group = self._context.pipeline_group
        if group is None:
            return [own]
        everything = [None] * dist.get_world_size(group)
        dist.all_gather_object(everything, own, group=group)
        return everything

    def begin_step(self, step: int) -> None:
        """Says what the forward passes of optimizer step ``step`` (from 1 on) are to collect."""
        records = self._adaptation.records(step)
        wanted = Wanted(compared=self._moves_thresholds, unclaimed=records, histogram=self._histogram)
        self._context.observing = wanted if self._holds or self._averages or records else None
        self._context.target_experts = self._budget.target(step - 1) or 1.0

    def end_step(self, step: int) -> list[AdaptationEvent]:
        """Acts on what step ``step`` saw; collective. Returns the experts that came and went, on every rank alike."""
        wanted, self._context.observing = self._context.observing, None
        if wanted is None:
            return []
        observations = reduce_observations(self._layers, self._context.token_group, wanted)
        if self._holds:
            self._budget.update([layer.router for layer in self._layers], observations, step)
        if self._averages:
            self._average(observations)
        return self._adapt(observations, step)

    def skip_step(self, step: int) -> list[AdaptationEvent]:
        """Forgets what step ``step`` saw, whose update was left out; collective. A window may still end with it."""
        wanted, self._context.observing = self._context.observing, None
        if wanted is None:
            return []
        for layer in self._layers:
            layer.take_observed()
        return self._adapt(None, step)

    def _adapt(self, observations: Sequence[Observation] | None, step: int) -> list[AdaptationEvent]:
        events = self._adaptation.update(self._layers, observations, step)
        if not self._adaptation.changes_at(step):
            return events
        everywhere = [event for stage in self._of_all_stages(events) for event in stage]
        return sorted(everywhere, key=lambda event: event.layer)

    @torch.no_grad()
    def _average(self, observations: Sequence[Observation]) -> None:
        for layer, observation in zip(self._layers, observations, strict=True):
            average = layer.router.experts_per_token
            average.copy_(moving_average(average, observation.experts_per_token.float()))
