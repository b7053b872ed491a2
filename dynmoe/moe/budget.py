"""Holds a budget of experts per token by moving control values of the routers between optimizer steps."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from dynmoe.config import Config
from dynmoe.moe.router import Router
from dynmoe.routers.base import BudgetStep
from dynmoe.routing.budget_rules import scheduled_target
from dynmoe.routing.update_statistics import UpdateStatistics


def drawn_budget(budgets: Sequence[float], seed: int, step: int) -> float:
    """The budget of optimizer step ``step`` (from 1), one of several.

    Random, but every block of as many steps as there are budgets has each of them once (arXiv 2509.26520 draws each
    step independently).
    """
    block, place = divmod(step - 1, len(budgets))
    return random.Random(f"{seed}/{block}").sample(list(budgets), len(budgets))[place]


class Budget:
    """Holds ``experts_per_token`` on average over tokens, identically on every rank.

    The rule (:meth:`RouterSpec.update`) and all state (in buffers) are the router's. The budget counts the selected
    experts, before capacity drops routes.

    Args:
        config: of the run: target, method, and budgets of the router.
        stages: ranks that hold the other layers of the model; None if this rank holds all of them.
        device: of the routers.
    """

    def __init__(
        self, config: Config, stages: dist.ProcessGroup | None = None, device: torch.device | str = "cpu"
    ) -> None:
        self.config = config.budget
        self._budgets = config.model.router.budgets
        self._seed = config.train.seed
        self.stages = stages
        self.device = device

    def of_step(self, step: int) -> float | None:
        """Experts per token in optimizer step ``step`` (from 1); None without a budget."""
        return drawn_budget(self._budgets, self._seed, step) if self._budgets else self._scheduled(step - 1)

    def _scheduled(self, step: int) -> float | None:
        """Experts per token to reach after optimizer step ``step``."""
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
        # With several budgets the next step has its own control value, and this step's is corrected by what it saw.
        target = self.of_step(step) if self._budgets else self._scheduled(step)
        observed = [layer.experts_per_token.float() for layer in statistics]
        if config.scope == "global":
            observed = [self._mean_over_layers(observed)] * len(observed)
        gains = (config.method, config.proportional, config.integral, config.rate)
        for router, seen, experts_per_token in zip(routers, statistics, observed, strict=True):
            router.spec.update(router.at(target), seen, BudgetStep(*gains, experts_per_token, target))

    def _mean_over_layers(self, observed: list[Tensor]) -> Tensor:
        """The mean over all layers of the model, on the device."""
        local = torch.stack(observed).double() if observed else torch.zeros(0, dtype=torch.float64, device=self.device)
        sums = torch.stack([local.sum(), torch.ones_like(local).sum()])
        if self.stages is not None:
            dist.all_reduce(sums, group=self.stages)
        return (sums[0] / sums[1]).float()
