"""What several routers have in common: logits by one matrix, thresholds, and PI control of a buffer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Optional

from dynmoe.fields import option
from dynmoe.routers.base import BudgetStep, RouterSpec, RouterState, TensorSpec, auxiliary, by_variant
from dynmoe.routers.losses import balance_term

if TYPE_CHECKING:
    from torch import Tensor

    from dynmoe.routing.control_statistics import ControlStatistics

_LOSS_FREE_RATE = 0.1
# Thresholds stay within this many deviations of the mean score: no token may lie further away.
_REACH = 6.0


def pi_step(state: RouterState, budget: BudgetStep) -> Tensor:
    """The change that a PI controller asks for, positive for more experts; moves its memory, so call it once a step.

    Raises:
        AssertionError: there is no target.
    """
    from dynmoe.routing.control import budget_error, pi_change

    assert budget.target is not None
    error = budget_error(budget.experts_per_token, budget.target)
    change = pi_change(error, state.error, budget.proportional, budget.integral)
    state.error.copy_(error)
    return change


@dataclass
class LinearRouter(RouterSpec):
    """A router whose scores come from logits, x · Wᵀ."""

    def parameters(self, hidden: int, num_experts: int) -> dict[str, TensorSpec]:
        return {"weight_ED": TensorSpec((num_experts + self.num_null_experts, hidden), None, export="tensor")}

    def logits_TE(self, state: RouterState, x_TD: Tensor) -> Tensor:
        return state.linear(x_TD, state.weight_ED)


@dataclass
class BalancedRouter(RouterSpec):
    """A router with a load-balancing loss over its scores, and gates that may be renormalized."""

    renormalize: Optional[bool] = by_variant(False, "make the gates of a token sum to 1")
    balance_loss: Optional[float] = auxiliary(balance_term, "the load-balancing loss")
    balance_per_route: Optional[bool] = by_variant(
        False, "divide the load-balancing loss by the observed experts per token"
    )


@dataclass
class LimitedRouter(RouterSpec):
    """A router with limits on the experts of a token."""

    min_experts: Optional[int] = by_variant(1, "fewest experts of a token (0: a token may use none)", at_least=0)
    max_experts: Optional[int] = option(None, "most experts of a token; null: all", at_least=1)


@dataclass
class ThresholdRouter(RouterSpec):
    """A router with a threshold for each expert: ``offset_E`` moves it; ``calibrated``: first scores have set it."""

    initial_experts: Optional[float] = by_variant(
        None, "experts per token at the start, by thresholds from the first scores", above=0
    )

    def buffers(self, hidden: int, num_experts: int) -> dict[str, TensorSpec]:
        return {
            "offset_E": TensorSpec((num_experts,), self.initial_threshold, export="tensor"),
            "calibrated": TensorSpec((), self.resolved.initial_experts is None, "bool"),
        }

    @property
    def initial_threshold(self) -> float:
        return 0.0

    def threshold_scores_E(self, state: RouterState) -> Tensor:
        """The thresholds in force as scores, between 0 and 1."""
        raise NotImplementedError

    def control_value(self, state: RouterState) -> Tensor:
        active_E = state.active_E
        return (self.threshold_scores_E(state) * active_E).sum() / active_E.sum()


@dataclass
class HeldThresholdRouter(ThresholdRouter):
    """Thresholds that a budget moves together (pi), and also one by one for the balance (loss_free).

    ``deviation`` is a moving average of the deviation, within an expert, of what its threshold is compared with.
    """

    BUDGET_METHODS: ClassVar[tuple[str, ...]] = ("pi", "loss_free")
    NEEDS_DEVIATION: ClassVar[bool] = True

    def buffers(self, hidden: int, num_experts: int) -> dict[str, TensorSpec]:
        return super().buffers(hidden, num_experts) | {"deviation": TensorSpec(), "error": TensorSpec()}

    def base_E(self, state: RouterState) -> Tensor | float:
        """What the offsets are added to."""
        raise NotImplementedError

    def update(self, state: RouterState, seen: ControlStatistics, budget: BudgetStep) -> None:
        from dynmoe.routing.control import balance_change, moving_average

        assert seen.mean_E is not None
        assert seen.variance_E is not None
        active_E = state.active_E
        now = ((seen.variance_E * active_E).sum() / active_E.sum()).sqrt().float()
        state.deviation.copy_(moving_average(state.deviation, now))
        change_E = -pi_step(state, budget).expand_as(state.offset_E)
        if budget.method == "loss_free":
            rate = budget.rate or _LOSS_FREE_RATE
            change_E = change_E + balance_change(seen.selected_E, active_E, rate).float()
        base_E = self.base_E(state)
        reach = _REACH * state.deviation
        mean_E = seen.mean_E.float()
        moved_E = (base_E + state.offset_E + change_E * state.deviation).clamp(mean_E - reach, mean_E + reach)
        state.offset_E.copy_((moved_E - base_E).where(active_E, state.offset_E))
