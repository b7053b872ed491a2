"""Expert-threshold routing (arXiv 2603.11535): each cut-off tracks the score of its expert's k-th best token."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from dynmoe.fields import option
from dynmoe.routers.base import BudgetStep, RouterState, TensorSpec, register
from dynmoe.routers.parts import BalancedRouter, LinearRouter, ThresholdRouter

if TYPE_CHECKING:
    from torch import Tensor

    from dynmoe.routing.plan import RoutingPlan
    from dynmoe.routing.update_statistics import UpdateStatistics

# The largest number below 1 in fp32: no score exceeds a cut-off of 1.
_BELOW_ONE = 1.0 - 2.0**-24


@register("expert_threshold")
class ExpertThreshold(LinearRouter, ThresholdRouter, BalancedRouter):
    """Selects every expert whose score exceeds its cut-off, ``offset_E``.

    Cut-offs are scores, as published. In fp32, neighbors above a logit of about 15 cannot be told apart, and an expert
    whose tokens have such logits takes more of them than its share.
    """

    HAS_OWN_RULE: ClassVar[bool] = True
    HOLDS_GLOBALLY: ClassVar[bool] = False
    NEEDS_HISTOGRAM: ClassVar[bool] = True
    BALANCES_SEQUENCES: ClassVar[bool] = True

    cutoff: float = option(0.5, "cut-off until the first batch calibrates all of them", above=0, below=1)
    cutoff_decay: float = option(0.9, "decay of the moving average of the cut-offs", at_least=0, below=1)

    def buffers(self, hidden: int, num_experts: int) -> dict[str, TensorSpec]:
        # Without initial_experts, the first batch gives cut-offs for the budget.
        return super().buffers(hidden, num_experts) | {"calibrated": TensorSpec((), False, "bool")}

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

        cutoffs_E = state.offset_E.clamp(max=_BELOW_ONE)
        return expert_threshold(self.logits_TE(state, x_TD), cutoffs_E, **self.arguments("renormalize"))

    def histogram_EC(self, state: RouterState, plan: RoutingPlan) -> Tensor:
        from dynmoe.routing.histogram import NUM_BINS
        from dynmoe.routing.quantile import quantile_histogram

        assert plan.logits_TE is not None
        return quantile_histogram(plan.logits_TE, _logits_of(state.offset_E), NUM_BINS)

    def update(self, state: RouterState, seen: UpdateStatistics, budget: BudgetStep) -> None:
        from dynmoe.routing.histogram import move_cutoffs
        from dynmoe.routing.quantile import quantile_thresholds

        assert seen.histogram_EC is not None
        assert budget.target is not None
        share = budget.target / len(seen.histogram_EC)
        kth_best_E = quantile_thresholds(seen.histogram_EC, share, _logits_of(state.offset_E)).sigmoid()
        state.offset_E.copy_(move_cutoffs(state.offset_E, kth_best_E, self.cutoff_decay))


def _logits_of(cutoffs_E: Tensor) -> Tensor:
    """Logits of cut-offs, from which logits are counted: the scores of large ones hardly differ."""
    return cutoffs_E.logit(eps=1e-6)
