"""Expert-Token Resonance (arXiv 2406.00023): tokens choose experts, and experts choose among those tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from dynmoe.errors import ConfigError
from dynmoe.fields import option
from dynmoe.routers.base import BudgetStep, RouterState, TensorSpec, register
from dynmoe.routers.parts import BalancedRouter, experts_to_select

if TYPE_CHECKING:
    from torch import Tensor

    from dynmoe.routing.plan import RoutingPlan
    from dynmoe.routing.update_statistics import UpdateStatistics


@register("resonance")
class Resonance(BalancedRouter):
    """Every token chooses ``k`` experts; of these pairs, the experts keep S * K in a sequence of S tokens.

    The paper ends the choice of an expert at some sum of affinities, which it does not specify. Here the budget K ends
    it: the experts take turns until it is used up. The gates are the softmax of the affinities. The weights that are
    compared with tokens start as grouped average pooling and are trained. The paper's loss of locality, which concerns
    the network and not the choice, is left out.

    ``cutoffs_E`` are moving averages of the affinity of the last token that each expert keeps. In evaluation they
    replace the choice of the experts; while they are 0, the tokens alone choose.
    """

    VARIANTS: ClassVar[dict[str, dict[str, Any]]] = {"paper": {"balance_loss": 1e-2, "balance_per_route": True}}
    HAS_OWN_RULE: ClassVar[bool] = True
    HOLDS_GLOBALLY: ClassVar[bool] = False
    NEEDS_HISTOGRAM: ClassVar[bool] = True
    BALANCES_SEQUENCES: ClassVar[bool] = True
    SELECTS_AMONG: ClassVar[str] = "sequence"

    k: int = option(2, "experts that a token chooses, of which the experts' choice leaves some", at_least=1)
    scale: float = option(1.0, "factor on affinities in the softmax of the gates", above=0)
    cutoff_decay: float = option(0.5, "decay of the moving average of the cut-offs", at_least=0, below=1)

    def max_experts_per_token(self, num_experts: int) -> int:
        return min(self.k, num_experts)

    def parameters(self, hidden: int, num_experts: int) -> dict[str, TensorSpec]:
        if num_experts > hidden:
            problem = "leaves experts without a feature in the resonance router"
            raise ConfigError("model.hidden", hidden, problem, f"use at least model.moe.experts ({num_experts})")
        return {"affinity_D": TensorSpec((hidden,), num_experts / hidden, export="tensor")}

    def buffers(self, hidden: int, num_experts: int) -> dict[str, TensorSpec]:
        return {"cutoffs_E": TensorSpec((num_experts,), export="tensor", by_budget=True)}

    def histogram_EC(self, state: RouterState, plan: RoutingPlan) -> Tensor:
        from dynmoe.routing.histogram import score_histogram
        from dynmoe.routing.resonance import chosen_by_tokens

        assert plan.logits_TE is not None
        return score_histogram(chosen_by_tokens(plan.logits_TE / self.scale, self.k))

    def route(self, state: RouterState, x_TD: Tensor) -> RoutingPlan:
        from dynmoe.routing.resonance import affinities, chosen_by_both, chosen_by_tokens
        from dynmoe.routing.selection import softmax_plan

        affinity_TE = affinities(x_TD, state.affinity_D, len(state.cutoffs_E))
        values_TE = chosen_by_tokens(affinity_TE, self.k)
        if state.training:
            map_TE = chosen_by_both(values_TE, experts_to_select(self.kind, state), state.scope)
        else:
            map_TE = values_TE > state.cutoffs_E
        logits_TE = self.scale * affinity_TE
        return softmax_plan(logits_TE, logits_TE.softmax(dim=1), map_TE, **self.arguments("renormalize"))

    def control_value(self, state: RouterState) -> Tensor:
        cutoffs_E: Tensor = state.cutoffs_E
        return cutoffs_E.mean()

    def update(self, state: RouterState, seen: UpdateStatistics, budget: BudgetStep) -> None:
        from dynmoe.routing.budget_rules import moving_average
        from dynmoe.routing.resonance import resonance_cutoffs

        assert seen.histogram_EC is not None
        assert budget.target is not None
        last_E = resonance_cutoffs(seen.histogram_EC, seen.tokens * budget.target)
        state.cutoffs_E.copy_(moving_average(state.cutoffs_E, last_E, self.cutoff_decay))
