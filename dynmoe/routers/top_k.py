"""Top-k: the same number of experts for every token, the baseline of the dynamic routers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Optional

from dynmoe.errors import ConfigError
from dynmoe.fields import option
from dynmoe.routers.base import BudgetStep, RouterState, TensorSpec, auxiliary, register
from dynmoe.routers.losses import entropy_term, z_term
from dynmoe.routers.parts import BalancedRouter, LinearRouter

if TYPE_CHECKING:
    from torch import Tensor

    from dynmoe.routing.plan import RoutingPlan
    from dynmoe.routing.update_statistics import UpdateStatistics

_BIAS_RATE = 1e-3


@register("top_k")
class TopK(LinearRouter, BalancedRouter):
    """Selects the k experts of highest score, after adding ``bias_E``.

    ``budget.method`` moves the biases after each step: loss_free by a constant towards equal loads (arXiv 2408.15664),
    quantile to the biases that would have given the step equal loads (https://kexue.fm/archives/11619; Megatron-Core
    from 0.19 on, torchtitan). Both leave the gates and the loss alone.
    """

    VARIANTS: ClassVar[dict[str, dict[str, Any]]] = {"paper": {"balance_loss": 1e-2, "balance_per_route": True}}
    BUDGET_METHODS: ClassVar[tuple[str, ...]] = ("loss_free", "quantile")
    HOLDS_GLOBALLY: ClassVar[bool] = False
    CONTROL_METRIC: ClassVar[str] = "router_k"
    BALANCES_SEQUENCES: ClassVar[bool] = True
    SETS_NUMBER: ClassVar[bool] = True
    LIMITS_GROUPS: ClassVar[bool] = True

    k: int = option(2, "experts per token", at_least=1, served=True)
    score_function: str = option(
        "softmax", "scores of the experts: softmax over all, or a sigmoid of each logit (DeepSeek-V3)",
        choices=("softmax", "sigmoid"),
    )  # fmt: skip
    entropy_loss: Optional[float] = auxiliary(entropy_term, "the router entropy")
    z_loss: Optional[float] = auxiliary(z_term, "the router z-loss")

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(budget != int(budget) for budget in self.budgets):
            problem = "a token takes a whole number of experts"
            raise ConfigError("model.router.budgets", self.budgets, problem, "use whole numbers, or another kind")

    @property
    def fixed_experts(self) -> int | None:
        return None if self.budgets else self.k

    @property
    def min_experts_per_token(self) -> int:
        return int(self.budgets[0]) if self.budgets else self.k

    def max_experts_per_token(self, num_experts: int) -> int:
        return min(int(self.budgets[-1]) if self.budgets else self.k, num_experts)

    def check_budget(self, wanted: float, field: str) -> None:
        super().check_budget(wanted, field)
        if wanted != int(wanted):
            raise ConfigError(field, wanted, "is not a whole number, which the top_k router needs", "use one")

    def experts_of(self, state: RouterState) -> int:
        """The number of experts of each token."""
        return int(state.target_experts or self.k) if self.budgets else self.k

    def buffers(self, hidden: int, num_experts: int) -> dict[str, TensorSpec]:
        return {"bias_E": TensorSpec((num_experts,), export="tensor", by_budget=True)}

    def route(self, state: RouterState, x_TD: Tensor) -> RoutingPlan:
        from dynmoe.routing.top_k import top_k

        k = self.experts_of(state)
        options = self.arguments("renormalize", "score_function", "n_group", "topk_group")
        return top_k(self.logits_TE(state, x_TD), k, bias_E=state.bias_E, **options)

    def control_value(self, state: RouterState) -> Tensor:
        return state.experts_per_token.new_full((), float(self.experts_of(state)))

    def histogram_EC(self, state: RouterState, plan: RoutingPlan) -> Tensor:
        from dynmoe.routing.top_k import margin_histogram

        return margin_histogram(plan.scores_TE, state.bias_E, self.experts_of(state))

    def update(self, state: RouterState, seen: UpdateStatistics, budget: BudgetStep) -> None:
        from dynmoe.routing.budget_rules import bias_change
        from dynmoe.routing.top_k import quantile_bias

        if budget.method == "none":
            return
        if budget.method == "quantile":
            assert seen.histogram_EC is not None
            wanted_E = quantile_bias(state.bias_E, seen.histogram_EC, self.experts_of(state))
            state.bias_E.lerp_(wanted_E.float(), budget.rate or 1.0)
            # A constant in all biases changes no choice.
            state.bias_E.sub_(state.bias_E.mean())
            return
        state.bias_E.add_(bias_change(seen.selected_E, budget.rate or _BIAS_RATE).float())
