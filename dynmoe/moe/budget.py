"""A budget of experts per token, held between optimizer steps by moving what the routers compare scores with."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dynmoe.config.control import BudgetConfig
from dynmoe.moe.observation import Observation
from dynmoe.moe.routers import Router
from dynmoe.routing import control


class Budget:
    """Holds ``experts_per_token`` in the mean over tokens: the same decision on every rank from the same sums.

    The rule is the router's (:meth:`Router.hold`), and so is all state: it lies in buffers and goes into checkpoints
    with them. What a token selects counts, before capacity drops routes.
    """

    def __init__(self, config: BudgetConfig) -> None:
        self.config = config

    def target(self, step: int) -> float | None:
        """Experts per token wanted from optimizer step ``step`` + 1 on; None without a budget."""
        config = self.config
        if config.experts_per_token is None:
            return None
        return control.scheduled_target(config.experts_per_token, config.start, config.over_steps, step)

    @torch.no_grad()
    def update(self, routers: Sequence[Router], observations: Sequence[Observation], step: int) -> None:
        """Moves every router's state after optimizer step ``step``, given what that step saw."""
        target = self.target(step)
        observed = [observation.experts_per_token.float() for observation in observations]
        if self.config.scope == "global":
            observed = [torch.stack(observed).mean()] * len(observed)
        for router, observation, experts_per_token in zip(routers, observations, observed, strict=True):
            router.hold(self.config, observation, experts_per_token, target)
