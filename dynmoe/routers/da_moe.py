"""DA-MoE (arXiv 2409.06669): the attention of a layer decides how many experts a token gets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from dynmoe.fields import option
from dynmoe.routers.base import BudgetStep, RouterState, TensorSpec, register
from dynmoe.routers.parts import BalancedRouter, LimitedRouter, LinearRouter, pi_step

if TYPE_CHECKING:
    from torch import Tensor

    from dynmoe.routing.plan import RoutingPlan
    from dynmoe.routing.update_statistics import UpdateStatistics


@register("da_moe")
class DAMoE(LinearRouter, BalancedRouter, LimitedRouter):
    """Selects the K most probable experts, K in proportion to the importance of the token in the layer's attention.

    The paper takes the importance from attention weights. Attention that later tokens pay to a token is not known when
    a decoder generates it. Here only the attention that has been paid up to the token counts, which is its own
    (:func:`dynmoe.model.importance.importance`), in training as in evaluation. That measure and the proportion,
    ``slope``, are our choices.
    """

    VARIANTS: ClassVar[dict[str, dict[str, Any]]] = {"paper": {"balance_loss": 1e-2, "balance_per_route": True}}
    BUDGET_METHODS: ClassVar[tuple[str, ...]] = ("pi",)
    CONTROL_METRIC: ClassVar[str] = "router_k"
    BALANCES_SEQUENCES: ClassVar[bool] = True
    LIMITS_GROUPS: ClassVar[bool] = True
    NEEDS_ATTENTION: ClassVar[bool] = True

    experts_at_uniform: float = option(2.0, "initial experts of a token whose attention is uniform", above=0)

    def buffers(self, hidden: int, num_experts: int) -> dict[str, TensorSpec]:
        slope = TensorSpec((), self.experts_at_uniform, export="tensor", by_budget=True)
        return {"slope": slope, "error": TensorSpec(by_budget=True)}

    def route(self, state: RouterState, x_TD: Tensor) -> RoutingPlan:
        from dynmoe.routing.da_moe import experts_by_importance
        from dynmoe.routing.selection import softmax_plan

        if state.importance_T is None:
            cure = "use a layer of dynmoe.model.Decoder, or another router"
            raise ValueError(f"importance_T=None: the da_moe router needs the attention of its layer; {cure}")
        logits_TE = self.logits_TE(state, x_TD)
        probs_TE = logits_TE.softmax(dim=1)
        limits = self.arguments("min_experts", "max_experts", "n_group", "topk_group")
        map_TE = experts_by_importance(probs_TE, state.importance_T, state.slope, **limits)
        return softmax_plan(logits_TE, probs_TE, map_TE, **self.arguments("renormalize"))

    def control_value(self, state: RouterState) -> Tensor:
        slope: Tensor = state.slope
        return slope

    def update(self, state: RouterState, seen: UpdateStatistics, budget: BudgetStep) -> None:
        state.slope.copy_((state.slope * pi_step(state, budget).exp()).clamp(1e-3, 1e3))
