"""Identity experts of LongCat-Flash (arXiv 2509.01322), zero and constant experts of MoE++ (arXiv 2410.07348)."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import TYPE_CHECKING, Any, ClassVar, Optional

from dynmoe.errors import ConfigError
from dynmoe.fields import option
from dynmoe.routers.base import BudgetStep, LossInputs, RouterState, TensorSpec, auxiliary, register
from dynmoe.routers.losses import z_term
from dynmoe.routers.parts import LinearRouter

if TYPE_CHECKING:
    from torch import Tensor

    from dynmoe.routing.plan import RoutingPlan
    from dynmoe.routing.update_statistics import UpdateStatistics

_RATE = 0.1


def group_balance_term(inputs: LossInputs) -> Tensor:
    """Load balance over groups of FFN experts and the group of all zero-computation experts."""
    from dynmoe.routing.identity_experts import group_balance

    spec = inputs.spec
    num_experts = inputs.plan.scores_TE.shape[1]
    # Without a budget, as if all experts were alike.
    target = inputs.state.target_experts or spec.k * num_experts / (num_experts + spec.num_zero_computation)
    return group_balance(inputs.plan, spec.k, spec.balance_groups or num_experts, target, inputs.counts)


@register("identity_experts")
class IdentityExperts(LinearRouter):
    """Selects the k best of FFN and zero-computation experts; only FFN experts are dispatched and computed.

    A budget holds the mean number of FFN experts by their biases alone.
    """

    VARIANTS: ClassVar[dict[str, dict[str, Any]]] = {"paper": {"balance_loss": 1e-2}}
    BUDGET_METHODS: ClassVar[tuple[str, ...]] = ("loss_free",)
    HOLDS_GLOBALLY: ClassVar[bool] = False
    CONTROL_METRIC: ClassVar[str] = "router_bias_mean"
    ADDS_OUTPUT: ClassVar[bool] = True
    LIMITS_GROUPS: ClassVar[bool] = True

    k: int = option(3, "experts per token, including zero-computation experts", at_least=1, served=True)
    num_identity: int = option(8, "number of experts that return the token (LongCat-Flash; MoE++: copy)", at_least=0)
    num_zero: int = option(0, "number of experts that return nothing (MoE++)", at_least=0)
    num_constant: int = option(
        0, "number of experts that return a mix of the token and a trained vector (MoE++)", at_least=0
    )
    balance_groups: Optional[int] = option(
        None, "groups of FFN experts whose load is balanced, such as devices; null: each expert", at_least=1
    )
    balance_loss: Optional[float] = auxiliary(group_balance_term, "the load-balancing loss")
    z_loss: Optional[float] = auxiliary(z_term, "the router z-loss")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_zero_computation == 0:
            problem = "leaves no zero-computation expert"
            raise ConfigError("model.router.num_identity", self.num_identity, problem, "use 1 or more, or kind=top_k")

    @property
    def num_zero_computation(self) -> int:
        return self.num_identity + self.num_zero + self.num_constant

    def max_experts_per_token(self, num_experts: int) -> int:
        return min(self.k, self.usable_experts(num_experts))

    def check_layers(self, sizes: Collection[int]) -> None:
        super().check_layers(sizes)
        groups = self.balance_groups
        undivided = [] if groups is None else [size for size in sizes if size % groups]
        if undivided:
            problem = f"does not divide the experts of a layer ({undivided[0]})"
            raise ConfigError("model.router.balance_groups", groups, problem, "use a divisor of model.moe.experts")

    def parameters(self, hidden: int, num_experts: int) -> dict[str, TensorSpec]:
        tensors = super().parameters(hidden, num_experts)
        if self.num_constant:
            tensors["constants_JD"] = TensorSpec((self.num_constant, hidden), None, export="tensor")
            tensors["mix_J2D"] = TensorSpec((self.num_constant, 2, hidden), None, export="tensor")
        return tensors

    def buffers(self, hidden: int, num_experts: int) -> dict[str, TensorSpec]:
        return {"bias_X": TensorSpec((num_experts + self.num_zero_computation,), export="tensor", by_budget=True)}

    def route(self, state: RouterState, x_TD: Tensor) -> RoutingPlan:
        from dynmoe.routing.identity_experts import constant_output, identity_experts, identity_output

        logits_TX = self.logits_TE(state, x_TD)
        num_experts = logits_TX.shape[1] - self.num_zero_computation
        groups = self.arguments("n_group", "topk_group")
        plan, gates_TZ = identity_experts(logits_TX, self.k, num_experts, bias_X=state.bias_X, **groups)
        gates_TZ = self.gate_scale * gates_TZ  # the caller scales those of the FFN experts
        local_TD = identity_output(x_TD, gates_TZ, self.num_identity)
        if self.num_constant:
            mix_TJ2 = state.linear(x_TD, state.mix_J2D.flatten(0, 1)).unflatten(1, (self.num_constant, 2))
            local_TD = local_TD + constant_output(x_TD, gates_TZ, mix_TJ2, state.constants_JD)
        return dataclasses.replace(plan, local_TD=local_TD)

    def control_value(self, state: RouterState) -> Tensor:
        mean: Tensor = state.bias_X[: len(state.active_E)].mean()
        return mean

    def update(self, state: RouterState, seen: UpdateStatistics, budget: BudgetStep) -> None:
        from dynmoe.routing.identity_experts import ffn_bias_change

        assert budget.target is not None
        rate = budget.rate or _RATE
        change_E = ffn_bias_change(seen.selected_E, seen.tokens, self.k, budget.target, rate)
        state.bias_X[: len(change_E)] += change_E.float()
