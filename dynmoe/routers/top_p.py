"""Top-p: "Harder Tasks Need More Experts" (arXiv 2403.07652)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Optional

from dynmoe.errors import ConfigError
from dynmoe.fields import option
from dynmoe.routers.base import BudgetStep, RouterState, TensorSpec, auxiliary, register
from dynmoe.routers.losses import entropy_term, z_term
from dynmoe.routers.parts import BalancedRouter, LimitedRouter, LinearRouter, pi_step

if TYPE_CHECKING:
    from torch import Tensor

    from dynmoe.routing.plan import RoutingPlan
    from dynmoe.routing.update_statistics import UpdateStatistics

# Section 3.3: alpha and beta.
_LOSSES = {"balance_loss": 1e-2, "entropy_loss": 1e-4}


@register("top_p")
class TopP(LinearRouter, BalancedRouter, LimitedRouter):
    """Selects the fewest experts, best first, whose probabilities reach ``p``, which a budget moves."""

    VARIANTS: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": _LOSSES,
        "released": _LOSSES,
        "improved": _LOSSES | {"balance_per_route": True},
    }
    BUDGET_METHODS: ClassVar[tuple[str, ...]] = ("pi",)
    CONTROL_METRIC: ClassVar[str] = "router_p"
    BALANCES_SEQUENCES: ClassVar[bool] = True
    LIMITS_GROUPS: ClassVar[bool] = True

    p: float = option(0.4, "probability mass that the selected experts reach", above=0, at_most=1, served=True)
    entropy_loss: Optional[float] = auxiliary(entropy_term, "the router entropy")
    z_loss: Optional[float] = auxiliary(z_term, "the router z-loss")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_experts_per_token < 1:
            problem = "is too small: top_p always selects an expert"
            raise ConfigError("model.router.min_experts", self.min_experts, problem, "use 1 or more")

    def buffers(self, hidden: int, num_experts: int) -> dict[str, TensorSpec]:
        return {"p": TensorSpec((), self.p, export="tensor", by_budget=True), "error": TensorSpec(by_budget=True)}

    def route(self, state: RouterState, x_TD: Tensor) -> RoutingPlan:
        return self.choose(state, self.logits_TE(state, x_TD))

    def choose(self, state: RouterState, logits_TE: Tensor) -> RoutingPlan:
        """The plan of tokens with these logits at the current p."""
        from dynmoe.routing.top_p import top_p

        variant = "released" if self.variant == "released" else "paper"
        limits = self.arguments("renormalize", "min_experts", "max_experts", "n_group", "topk_group")
        return top_p(logits_TE, state.p, variant=variant, **limits)

    def fit(self, state: RouterState, logits_TE: Tensor, experts_per_token: float) -> None:
        """Sets p to the smallest value at which these tokens use at least ``experts_per_token`` on average."""
        low = 0.0
        high = 1.0
        for _ in range(30):
            middle = (low + high) / 2
            state.p.fill_(middle)
            routes = float(self.choose(state, logits_TE).routing_map_TE.sum())
            if routes >= experts_per_token * len(logits_TE):
                high = middle
            else:
                low = middle
        state.p.fill_(high)

    def control_value(self, state: RouterState) -> Tensor:
        return state.p

    def update(self, state: RouterState, seen: UpdateStatistics, budget: BudgetStep) -> None:
        from dynmoe.routing.budget_rules import shift_probability

        state.p.copy_(shift_probability(state.p, pi_step(state, budget)))
