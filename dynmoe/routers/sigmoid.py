"""Sigmoid routing: an independent sigmoid score for each expert, and a cut-off that a budget moves."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

from dynmoe.fields import option
from dynmoe.routers.base import RouterState, register
from dynmoe.routers.parts import BalancedRouter, HeldThresholdRouter, LimitedRouter, LinearRouter

if TYPE_CHECKING:
    from torch import Tensor

    from dynmoe.routing.plan import RoutingPlan


@register("sigmoid")
class Sigmoid(LinearRouter, HeldThresholdRouter, BalancedRouter, LimitedRouter):
    """Selects every expert whose score exceeds the cut-off; ``offset_E`` moves its logit."""

    BALANCES_SEQUENCES: ClassVar[bool] = True
    LIMITS_GROUPS: ClassVar[bool] = True

    cutoff: float = option(0.5, "cut-off that the score of a selected expert exceeds", above=0, below=1, served=True)

    def base_E(self, state: RouterState) -> float:
        return math.log(self.cutoff / (1.0 - self.cutoff))

    def threshold_scores_E(self, state: RouterState) -> Tensor:
        scores_E: Tensor = (self.base_E(state) + state.offset_E).sigmoid()
        return scores_E

    def calibration_TE(self, state: RouterState, x_TD: Tensor) -> Tensor:
        return self.logits_TE(state, x_TD) - self.base_E(state)

    def compared_TE(self, state: RouterState, plan: RoutingPlan) -> Tensor:
        assert plan.logits_TE is not None
        return plan.logits_TE

    def route(self, state: RouterState, x_TD: Tensor) -> RoutingPlan:
        from dynmoe.routing.sigmoid import sigmoid_cutoff

        limits = self.arguments("renormalize", "min_experts", "max_experts", "n_group", "topk_group")
        return sigmoid_cutoff(self.logits_TE(state, x_TD), self.threshold_scores_E(state), **limits)
