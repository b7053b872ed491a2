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
# Thresholds stay within reach of every score: cosines lie in [-1, 1], logits hardly beyond 20.
_REACH = {"top_any": 2.0, "sigmoid": 20.0}


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
            else:
                if self.config.method == "loss_free":
                    self._balance(router, observation.selected_E)
                if target is not None:
                    self._hold(router, experts_per_token, target)

    def _hold(self, router: Router, experts_per_token: Tensor, target: float) -> None:
        error = control.budget_error(experts_per_token, target)
        change = control.pi_change(error, router.error, self.config.proportional, self.config.integral)
        router.error.copy_(error)
        if router.settings.kind == "top_p":
            router.p.copy_(control.shift_probability(router.p, change))
        else:
            self._shift(router, -change.expand_as(router.offset_E))

    def _balance(self, router: Router, selected_E: Tensor) -> None:
        if router.settings.kind == "top_k":
            router.offset_E.sub_(control.bias_change(selected_E, self.config.rate or _BIAS_RATE).float())
        else:
            rate = self.config.rate or _THRESHOLD_RATE
            self._shift(router, control.balance_change(selected_E, router.active_E, rate).float())

    @staticmethod
    def _shift(router: Router, change_E: Tensor) -> None:
        """Moves the thresholds of active experts; ``change_E`` is in deviations of a score."""
        moved_E = router.offset_E + change_E * router.threshold_unit
        reach = _REACH[router.settings.kind]
        router.offset_E.copy_(torch.where(router.active_E, moved_E.clamp(-reach, reach), router.offset_E))
