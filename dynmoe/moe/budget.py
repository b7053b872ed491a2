"""A budget of experts per token, held between optimizer steps by moving what the routers compare scores with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from dynmoe.config.control import BudgetConfig
from dynmoe.moe.observation import Observation
from dynmoe.moe.routers import Router
from dynmoe.routing import control


class Budget:
    """Holds ``experts_per_token`` in the mean over tokens: the same decision on every rank from the same sums.

    The rule is the router's (:meth:`Router.hold`), and so is all state: it lies in buffers and goes into checkpoints
    with them. What a token selects counts, before capacity drops routes.

    Args:
        config: target and method.
        stages: ranks that hold the other layers of the model; None where this rank holds all of them.
    """

    def __init__(self, config: BudgetConfig, stages: dist.ProcessGroup | None = None) -> None:
        self.config, self.stages = config, stages

    def target(self, step: int) -> float | None:
        """Experts per token wanted from optimizer step ``step`` + 1 on; None without a budget."""
        config = self.config
        if config.experts_per_token is None:
            return None
        return control.scheduled_target(config.experts_per_token, config.start, config.over_steps, step)

    @torch.no_grad()
    def update(self, routers: Sequence[Router], observations: Sequence[Observation], step: int) -> None:
        """Moves the state of this rank's routers after optimizer step ``step``, given what that step saw.

        Collective over ``stages`` where one number holds for all layers.
        """
        target = self.target(step)
        observed = [observation.experts_per_token.float() for observation in observations]
        if self.config.scope == "global":
            observed = [self._mean_over_layers(observed)] * len(observed)
        for router, observation, experts_per_token in zip(routers, observations, observed, strict=True):
            router.hold(self.config, observation, experts_per_token, target)

    def _mean_over_layers(self, observed: Sequence[Tensor]) -> Tensor:
        values = [value.item() for value in observed]
        if self.stages is not None:
            parts: list[list[float]] = [[] for _ in range(dist.get_world_size(self.stages))]
            dist.all_gather_object(parts, values, group=self.stages)
            values = [value for part in parts for value in part]
        return torch.tensor(sum(values) / len(values))
