"""A budget of experts per token, held between optimizer steps by moving what the routers compare scores with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from dynmoe.config.control import BudgetConfig
from dynmoe.moe.router import Router
from dynmoe.routers.base import BudgetStep
from dynmoe.routing.control import scheduled_target
from dynmoe.routing.control_statistics import ControlStatistics


class Budget:
    """Holds ``experts_per_token`` on average over tokens: the same decision on every rank from the same sums.

    The rule is the router's (:meth:`RouterSpec.update`), and so is all state: it lies in buffers.
    What a token selects counts, before capacity drops routes.

    Args:
        config: target and method.
        stages: ranks that hold the other layers of the model; None where this rank holds all of them.
        device: of the routers.
    """

    def __init__(
        self, config: BudgetConfig, stages: dist.ProcessGroup | None = None, device: torch.device | str = "cpu"
    ) -> None:
        self.config = config
        self.stages = stages
        self.device = device

    def target(self, step: int) -> float | None:
        """Experts per token wanted from optimizer step ``step`` + 1 on; None without a budget."""
        config = self.config
        if config.experts_per_token is None:
            return None
        return scheduled_target(config.experts_per_token, config.start, config.over_steps, step)

    @torch.no_grad()
    def update(self, routers: Sequence[Router], seen: Sequence[ControlStatistics], step: int) -> None:
        """Moves the state of this rank's routers after optimizer step ``step``, given what that step saw.

        Collective over ``stages`` where one number holds for all layers.
        """
        target = self.target(step)
        observed = [own.experts_per_token.float() for own in seen]
        if self.config.scope == "global":
            observed = [self._mean_over_layers(observed)] * len(observed)
        config = self.config
        for router, own, experts_per_token in zip(routers, seen, observed, strict=True):
            budget = BudgetStep(
                config.method, config.proportional, config.integral, config.rate, experts_per_token, target
            )
            router.spec.update(router, own, budget)

    def _mean_over_layers(self, observed: list[Tensor]) -> Tensor:
        """One number for all layers, of this stage and the others; it stays on the device."""
        own = torch.stack(observed).double() if observed else torch.zeros(0, dtype=torch.float64, device=self.device)
        sums = torch.stack([own.sum(), torch.ones_like(own).sum()])
        if self.stages is not None:
            dist.all_reduce(sums, group=self.stages)
        return (sums[0] / sums[1]).float()
