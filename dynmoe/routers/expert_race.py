"""Expert Race (arXiv 2503.16057): the best (token, expert) pairs of the whole batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Optional

from dynmoe.routers.base import LossInputs, RouterState, auxiliary, register
from dynmoe.routers.pooled import PooledRouter

if TYPE_CHECKING:
    from torch import Tensor

    from dynmoe.routing.plan import RoutingPlan
    from dynmoe.routing.scope import TokenScope


def similarity_term(inputs: LossInputs) -> Tensor:
    """Similarity of the scores of experts that are selected together in a forward pass of all ranks."""
    from dynmoe.routing.expert_race import router_similarity, selected_together

    together_EE = inputs.state.scope.sum(selected_together(inputs.plan.selected_map_TE))
    return router_similarity(inputs.plan.scores_TE, together_EE)


@register("expert_race")
class ExpertRace(PooledRouter):
    """Selects the T * K pairs of highest logit among the T tokens of all ranks; the gates are the logits.

    In evaluation the paper also compares with a moving average of the last selected logit. Its regularization of each
    layer by the target of diffusion has no counterpart here.
    """

    VARIANTS: ClassVar[dict[str, dict[str, Any]]] = {"paper": {"min_experts": 0, "similarity_loss": 1e-4}}
    SELECTS_AMONG: ClassVar[str] = "batch"

    similarity_loss: Optional[float] = auxiliary(similarity_term, "the similarity of experts selected together")

    def strength_TE(self, logits_TE: Tensor) -> Tensor:
        from dynmoe.routing.pooled import squeezed

        return squeezed(logits_TE)

    def best_TE(self, values_TE: Tensor, experts_per_token: float, scope: TokenScope) -> Tensor:
        from dynmoe.routing.pooled import best_of_batch

        return best_of_batch(values_TE, experts_per_token, scope)

    def route(self, state: RouterState, x_TD: Tensor) -> RoutingPlan:
        from dynmoe.routing.expert_race import race_plan

        logits_TE = self.logits_TE(state, x_TD)
        map_TE = self.chosen_TE(state, logits_TE)
        return race_plan(logits_TE, map_TE)

    def reroute(self, plan: RoutingPlan, selected_TE: Tensor) -> RoutingPlan:
        from dynmoe.routing.expert_race import race_plan

        assert plan.logits_TE is not None
        return race_plan(plan.logits_TE, selected_TE)
