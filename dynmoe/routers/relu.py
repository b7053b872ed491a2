"""ReLU routing: ReMoE (arXiv 2412.14711). An adaptive L1 penalty on the scores holds the budget."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Optional

from dynmoe.fields import option
from dynmoe.routers.base import BudgetStep, LossFunction, LossInputs, RouterState, TensorSpec, register
from dynmoe.routers.parts import LinearRouter

if TYPE_CHECKING:
    from torch import Tensor

    from dynmoe.routing.plan import RoutingPlan
    from dynmoe.routing.update_statistics import UpdateStatistics


def l1_term(inputs: LossInputs) -> Tensor:
    """L1 penalty on positive logits, weighted by load; without a budget, relative to one expert per token."""
    from dynmoe.routing.losses import l1

    return l1(inputs.plan, inputs.state.target_experts or 1.0, inputs.counts)


@register("relu")
class ReLU(LinearRouter):
    """Selects every expert of positive logit; the budget moves ``l1``, the coefficient of the penalty."""

    HAS_OWN_RULE: ClassVar[bool] = True
    CONTROL_METRIC: ClassVar[str] = "router_l1"
    LIMITS_GROUPS: ClassVar[bool] = True

    max_experts: Optional[int] = option(None, "maximum experts per token; null: all", at_least=1, served=True)
    l1_start: float = option(1e-8, "initial coefficient of the L1 penalty", above=0)

    def buffers(self, hidden: int, num_experts: int) -> dict[str, TensorSpec]:
        return {"l1": TensorSpec((), self.l1_start, export="config")}

    @property
    def losses(self) -> dict[str, LossFunction]:
        return {**super().losses, "l1": l1_term}

    def loss_coefficients(self, state: RouterState | None = None) -> dict[str, Any]:
        return super().loss_coefficients() | ({} if state is None else {"l1": state.l1})

    def route(self, state: RouterState, x_TD: Tensor) -> RoutingPlan:
        from dynmoe.routing.relu import relu

        return relu(self.logits_TE(state, x_TD), **self.arguments("max_experts", "n_group", "topk_group"))

    def control_value(self, state: RouterState) -> Tensor:
        coefficient: Tensor = state.l1
        return coefficient

    def update(self, state: RouterState, seen: UpdateStatistics, budget: BudgetStep) -> None:
        from dynmoe.routing.relu import adapt_l1

        # The paper has one sparsity for all layers (eq. 9): budget.scope=global.
        assert budget.target is not None
        state.l1.copy_(adapt_l1(state.l1, budget.experts_per_token, budget.target))
