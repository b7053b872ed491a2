"""A router of our own: every expert whose probability reaches a share of the token's highest one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Optional

from dynmoe.fields import option
from dynmoe.routers.base import BudgetStep, RouterState, TensorSpec, auxiliary, register
from dynmoe.routers.parts import BalancedRouter, LinearRouter, pi_step
from tests.spread_loss import spread_term

if TYPE_CHECKING:
    from torch import Tensor

    from dynmoe.routing.plan import RoutingPlan
    from dynmoe.routing.update_statistics import UpdateStatistics


@register("relative")
class Relative(LinearRouter, BalancedRouter):
    VARIANTS: ClassVar[dict[str, dict[str, Any]]] = {"paper": {"balance_loss": 1e-2, "spread_loss": 1e-3}}
    BUDGET_METHODS: ClassVar[tuple[str, ...]] = ("pi",)
    CONTROL_METRIC: ClassVar[str] = "router_share"

    share: float = option(0.5, "share of the highest probability that an expert must reach", above=0, at_most=1)
    spread_loss: Optional[float] = auxiliary(spread_term, "the variance of the scores")

    @property
    def min_experts_per_token(self) -> int:
        return 1

    def buffers(self, hidden: int, num_experts: int) -> dict[str, TensorSpec]:
        return {"share": TensorSpec((), self.share, export="tensor"), "error": TensorSpec()}

    def route(self, state: RouterState, x_TD: Tensor) -> RoutingPlan:
        from dynmoe.routing.selection import softmax_plan

        logits_TE = self.logits_TE(state, x_TD)
        probs_TE = logits_TE.softmax(dim=1)
        map_TE = probs_TE >= state.share * probs_TE.amax(dim=1, keepdim=True)
        return softmax_plan(logits_TE, probs_TE, map_TE, **self.arguments("renormalize"))

    def control_value(self, state: RouterState) -> Tensor:
        return state.share

    def update(self, state: RouterState, seen: UpdateStatistics, budget: BudgetStep) -> None:
        from dynmoe.routing.budget_rules import shift_probability

        state.share.copy_(shift_probability(state.share, -pi_step(state, budget)))
