"""Holds a budget of experts per token by moving control values of the routers between optimizer steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from dynmoe.config.budget import BudgetConfig
from dynmoe.moe.router import Router
from dynmoe.routers.base import BudgetStep
from dynmoe.routing.budget_rules import scheduled_target
from dynmoe.routing.update_statistics import UpdateStatistics


class Budget:
    """Holds ``experts_per_token`` on average over tokens, identically on every rank.

    The rule (:meth:`RouterSpec.update`) and all state (in buffers) are the router's. The budget counts the selected
    experts, before capacity drops routes.

    Args:
        config: target and method.
        stages: ranks that hold the other layers of the model; None if this rank holds all of them.
        device: of the routers.
    """

    def __init__(
        self, config: BudgetConfig, stages: dist.ProcessGroup | None = None, device: torch.device | str = "cpu"
    ) -> None:
        self.config = config
        self.stages = stages
        self.device = device

    def target(self, step: int) -> float | None:
        """Experts per token to reach after optimizer step ``step``; None without a budget."""
        config = self.config
        if config.experts_per_token is None:
            return None
        return scheduled_target(config.experts_per_token, config.start, config.over_steps, step)

    @torch.no_grad()
    def update(self, routers: Sequence[Router], statistics: Sequence[UpdateStatistics], step: int) -> None:
        """Updates the buffers of this rank's routers from the statistics of optimizer step ``step``.

        Collective over ``stages`` if the scope is global.
        """
        config = self.config
        target = self.target(step)
        observed = [layer.experts_per_token.float() for layer in statistics]
        if config.scope == "global":
            observed = [self._mean_over_layers(observed)] * len(observed)
        gains = (config.method, config.proportional, config.integral, config.rate)
        for router, seen, experts_per_token in zip(routers, statistics, observed, strict=True):
            router.spec.update(router, seen, BudgetStep(*gains, experts_per_token, target))

    def _mean_over_layers(self, observed: list[Tensor]) -> Tensor:
        """The mean over all layers of the model, on the device."""
        local = torch.stack(observed).double() if observed else torch.zeros(0, dtype=torch.float64, device=self.device)
        sums = torch.stack([local.sum(), torch.ones_like(local).sum()])
        if self.stages is not None:
            dist.all_reduce(sums, group=self.stages)
        return (sums[0] / sums[1]).float()
