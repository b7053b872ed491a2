"""Expert-threshold routing (arXiv 2603.11535): each cut-off tracks the score of its expert's k-th best token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from dynmoe.fields import option
from dynmoe.routers.base import BudgetStep, RouterState, register
from dynmoe.routers.parts import BalancedRouter, LinearRouter, ThresholdRouter

if TYPE_CHECKING:
    from torch import Tensor

    from dynmoe.routing.plan import RoutingPlan
    from dynmoe.routing.update_statistics import UpdateStatistics


@register("expert_threshold")
class ExpertThreshold(LinearRouter, ThresholdRouter, BalancedRouter):
    """Selects every expert whose score exceeds its cut-off, ``offset_E``."""

    VARIANTS: ClassVar[dict[str, dict[str, Any]]] = {"paper": {"initial_experts": 2.0}}
    HAS_OWN_RULE: ClassVar[bool] = True
    HOLDS_GLOBALLY: ClassVar[bool] = False
    NEEDS_HISTOGRAM: ClassVar[bool] = True
    BALANCES_SEQUENCES: ClassVar[bool] = True

    cutoff: float = option(0.5, "initial cut-off that the score of a selected expert exceeds", above=0, below=1)
    cutoff_decay: float = option(0.9, "decay of the moving average of the cut-offs", at_least=0, below=1)

    @property
    def initial_threshold(self) -> float:
        return self.cutoff

    def threshold_scores_E(self, state: RouterState) -> Tensor:
        scores_E: Tensor = state.offset_E
        return scores_E

    def calibration_TE(self, state: RouterState, x_TD: Tensor) -> Tensor:
        return self.logits_TE(state, x_TD).sigmoid()

    def route(self, state: RouterState, x_TD: Tensor) -> RoutingPlan:
        from dynmoe.routing.expert_threshold import expert_threshold

        return expert_threshold(self.logits_TE(state, x_TD), state.offset_E, **self.arguments("renormalize"))

    def histogram_EC(self, state: RouterState, plan: RoutingPlan) -> Tensor:
        from dynmoe.routing.histogram import score_histogram

        return score_histogram(plan.scores_TE)

    def update(self, state: RouterState, seen: UpdateStatistics, budget: BudgetStep) -> None:
        from dynmoe.routing.histogram import kth_largest, move_cutoffs

        assert seen.histogram_EC is not None
        assert budget.target is not None
        best_E = kth_largest(seen.histogram_EC, seen.tokens * budget.target / state.active_E.sum())
        state.offset_E.copy_(move_cutoffs(state.offset_E, best_E, self.cutoff_decay))
