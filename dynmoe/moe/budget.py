"""A budget of experts per token, held between optimizer steps by moving what the routers compare scores with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dynmoe.config.routing import BudgetConfig
from dynmoe.moe.observation import Observation
from dynmoe.moe.router import Router
from dynmoe.routing import control
from dynmoe.routing.expert_threshold import kth_largest, move_cutoffs
from dynmoe.routing.relu import adapt_l1

_THRESHOLD_RATE, _BIAS_RATE = 0.1, 1e-3
# Decay of the moving average of the deviation that thresholds are moved by.
_DECAY = 0.9


class Budget:
    """Holds ``experts_per_token`` in the mean over tokens: the same decision on every rank from the same sums.

    All state lies in the routers' buffers and goes into checkpoints with them. What a token selects counts, before
    capacity drops routes.
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
            if router.settings.kind == "relu":
                assert target is not None
                # One sparsity over all layers in the paper (eq. 9); by layer here unless the scope is global.
                router.l1.copy_(adapt_l1(router.l1, experts_per_token, target))
            elif router.settings.kind == "expert_threshold":
                assert target is not None
                assert observation.histogram_EB is not None
                wanted = observation.tokens * target / router.active_E.sum()
                best_E = kth_largest(observation.histogram_EB, wanted)
                router.offset_E.copy_(move_cutoffs(router.offset_E, best_E, router.settings.cutoff_decay))
            elif router.settings.kind == "top_k":
                change_E = control.bias_change(observation.selected_E, self.config.rate or _BIAS_RATE)
                router.offset_E.sub_(change_E.float())
            else:
                assert target is not None
                self._hold(router, observation, experts_per_token, target)

    def _hold(self, router: Router, observation: Observation, experts_per_token: Tensor, target: float) -> None:
        error = control.budget_error(experts_per_token, target)
        change = control.pi_change(error, router.error, self.config.proportional, self.config.integral)
        router.error.copy_(error)
        if router.settings.kind == "top_p":
            router.p.copy_(control.shift_probability(router.p, change))
            return
        assert observation.mean_E is not None
        assert observation.variance_E is not None
        active_E = router.active_E
        old, now = router.deviation, ((observation.variance_E * active_E).sum() / active_E.sum()).sqrt().float()
        old.copy_(torch.where(old > 0, _DECAY * old + (1 - _DECAY) * now, now))
        change_E = -change.expand_as(router.offset_E)
        if self.config.method == "loss_free":
            rate = self.config.rate or _THRESHOLD_RATE
            change_E = change_E + control.balance_change(observation.selected_E, active_E, rate).float()
        router.shift_thresholds(change_E, observation.mean_E.float())
