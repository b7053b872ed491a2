"""The base of routers that select the best (token, expert) pairs of a pool of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from dynmoe.fields import option
from dynmoe.routers.base import BudgetStep, RouterState, TensorSpec
from dynmoe.routers.parts import LimitedRouter, LinearRouter, experts_to_select

if TYPE_CHECKING:
    from torch import Tensor

    from dynmoe.routing.plan import RoutingPlan
    from dynmoe.routing.scope import TokenScope
    from dynmoe.routing.update_statistics import UpdateStatistics


@dataclass
class PooledRouter(LinearRouter, LimitedRouter):
    """Selects the best pairs of a pool in training, and in evaluation every pair stronger than ``cutoff``.

    ``cutoff`` is a moving average of the strength of the last selected pair, 0 before the first step. With it, the
    choice for a token depends on no other token, and K is the target on average.
    """

    HAS_OWN_RULE: ClassVar[bool] = True
    HOLDS_GLOBALLY: ClassVar[bool] = False
    NEEDS_HISTOGRAM: ClassVar[bool] = True

    cutoff_decay: float = option(0.5, "decay of the moving average of the cut-offs", at_least=0, below=1)

    def buffers(self, hidden: int, num_experts: int) -> dict[str, TensorSpec]:
        return {"cutoff": TensorSpec(export="tensor", by_budget=True)}

    def strength_TE(self, logits_TE: Tensor) -> Tensor:
        """How strongly each pair competes, between 0 and 1."""
        raise NotImplementedError

    def contested_TE(self, logits_TE: Tensor) -> Tensor:
        """The strengths within the limits of a token."""
        from dynmoe.routing.pooled import contested

        return contested(self.strength_TE(logits_TE), **self.arguments("min_experts", "max_experts"))

    def best_TE(self, values_TE: Tensor, experts_per_token: float, scope: TokenScope) -> Tensor:
        """Mask of the pool's best pairs, as many as there are tokens times ``experts_per_token``."""
        raise NotImplementedError

    def chosen_TE(self, state: RouterState, logits_TE: Tensor) -> Tensor:
        """Mask of the selected pairs."""
        from dynmoe.routing.pooled import passing

        values_TE = self.contested_TE(logits_TE)
        if state.training:
            return self.best_TE(values_TE, experts_to_select(self.kind, state), state.scope)
        return passing(values_TE, state.cutoff)

    def histogram_EC(self, state: RouterState, plan: RoutingPlan) -> Tensor:
        from dynmoe.routing.histogram import score_histogram

        assert plan.logits_TE is not None
        return score_histogram(self.contested_TE(plan.logits_TE))

    def control_value(self, state: RouterState) -> Tensor:
        cutoff: Tensor = state.cutoff
        return cutoff

    def update(self, state: RouterState, seen: UpdateStatistics, budget: BudgetStep) -> None:
        from dynmoe.routing.budget_rules import moving_average
        from dynmoe.routing.pooled import pool_cutoff

        assert seen.histogram_EC is not None
        assert budget.target is not None
        last = pool_cutoff(seen.histogram_EC, seen.tokens * budget.target)
        state.cutoff.copy_(moving_average(state.cutoff, last, self.cutoff_decay))
