"""Null experts: AdaMoE (arXiv 2406.13233). Top-k over real experts and null experts, which do nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Optional

from dynmoe.fields import option
from dynmoe.routers.base import LossInputs, RouterState, auxiliary, by_variant, register
from dynmoe.routers.losses import z_term
from dynmoe.routers.parts import LinearRouter

if TYPE_CHECKING:
    from torch import Tensor

    from dynmoe.routing.plan import RoutingPlan


def null_balance_term(inputs: LossInputs) -> Tensor:
    """Load balance over real and null experts."""
    from dynmoe.routing.null_experts import null_balance

    return null_balance(inputs.plan, inputs.spec.k, inputs.spec.num_null, inputs.counts)


@register("null_experts")
class NullExperts(LinearRouter):
    """Selects the k most probable of real and null experts; only real ones compute."""

    VARIANTS: ClassVar[dict[str, dict[str, Any]]] = {"paper": {"renormalize": True, "balance_loss": 1e-2}}
    CONTROL_METRIC: ClassVar[str] = "router_k"
    LIMITS_GROUPS: ClassVar[bool] = True

    k: int = option(2, "experts per token, including null experts", at_least=1, served=True)
    num_null: int = option(16, "number of null experts, which compute nothing", at_least=1)
    renormalize: Optional[bool] = by_variant(False, "make the gates of a token sum to 1")
    balance_loss: Optional[float] = auxiliary(null_balance_term, "the load-balancing loss")
    z_loss: Optional[float] = auxiliary(z_term, "the router z-loss")

    @property
    def num_zero_computation(self) -> int:
        return self.num_null

    @property
    def expected_experts(self) -> float:
        return float(self.k)

    def max_experts_per_token(self, num_experts: int) -> int:
        return min(self.k, self.usable_experts(num_experts))

    def route(self, state: RouterState, x_TD: Tensor) -> RoutingPlan:
        from dynmoe.routing.null_experts import null_experts

        options = self.arguments("renormalize", "n_group", "topk_group")
        return null_experts(self.logits_TE(state, x_TD), self.k, self.num_null, **options)

    def control_value(self, state: RouterState) -> Tensor:
        return state.experts_per_token.new_full((), float(self.k))
