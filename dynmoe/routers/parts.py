"""Base classes that several routers share: linear logits, limits, thresholds, and PI control of a buffer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Optional

from dynmoe.fields import option
from dynmoe.routers.base import BudgetStep, RouterSpec, RouterState, TensorSpec, auxiliary, by_variant
from dynmoe.routers.losses import balance_term

if TYPE_CHECKING:
    from torch import Tensor

    from dynmoe.routing.update_statistics import UpdateStatistics

_LOSS_FREE_RATE = 0.1
# Thresholds stay within this many deviations of the mean score; beyond them there may be no tokens.
_REACH = 6.0


def pi_step(state: RouterState, budget: BudgetStep) -> Tensor:
    """Change of the control value by a PI controller, positive for more experts.

    Stores the error in ``state``, so it must be called once per step.
    """
    from dynmoe.routing.budget_rules import budget_error, pi_change

    assert budget.target is not None
    error = budget_error(budget.experts_per_token, budget.target)
    change = pi_change(error, state.error, budget.proportional, budget.integral)
    state.error.copy_(error)
    return change


def experts_to_select(kind: str, state: RouterState) -> float:
    """Experts per token that a router selects in training.

    Raises:
        ValueError: there is no budget.
    """
    if state.target_experts is None:
        raise ValueError(f"target_experts=None: the {kind} router selects by it in training; set it in StepState")
    return state.target_experts


@dataclass
class LinearRouter(RouterSpec):
    """A router whose scores come from linear logits, x · Wᵀ."""

    def parameters(self, hidden: int, num_experts: int) -> dict[str, TensorSpec]:
        return {"weight_ED": TensorSpec((num_experts + self.num_zero_computation, hidden), None, export="tensor")}

    def logits_TE(self, state: RouterState, x_TD: Tensor) -> Tensor:
        return state.linear(x_TD, state.weight_ED)


@dataclass
class BalancedRouter(RouterSpec):
    """A router with a load-balancing loss over its scores and optionally renormalized gates."""

    renormalize: Optional[bool] = by_variant(False, "make the gates of a token sum to 1")
    balance_loss: Optional[float] = auxiliary(balance_term, "the load-balancing loss")
    balance_per_route: Optional[bool] = by_variant(
        False, "divide the load-balancing loss by the observed experts per token"
    )


@dataclass
class LimitedRouter(RouterSpec):
    """A router with a floor and a ceiling of experts per token."""

    min_experts: Optional[int] = by_variant(
        1, "minimum experts per token (0: a token may use none)", at_least=0, served=True
    )
    max_experts: Optional[int] = option(None, "maximum experts per token; null: all", at_least=1, served=True)


@dataclass
class ThresholdRouter(RouterSpec):
    """A router with a threshold for each expert; ``offset_E`` moves it and ``calibrated`` is set after calibration."""

    initial_experts: Optional[float] = by_variant(
        None, "initial experts per token, to which thresholds are calibrated on the first batch", above=0
    )

    def buffers(self, hidden: int, num_experts: int) -> dict[str, TensorSpec]:
        return {
            "offset_E": TensorSpec((num_experts,), self.initial_threshold, export="tensor", by_budget=True),
            "calibrated": TensorSpec((), self.resolved.initial_experts is None, "bool"),
        }

    @property
    def initial_threshold(self) -> float:
        return 0.0

    def threshold_scores_E(self, state: RouterState) -> Tensor:
        """The current thresholds as scores, between 0 and 1."""
        raise NotImplementedError

    def control_value(self, state: RouterState) -> Tensor:
        active_E = state.active_E
        return (self.threshold_scores_E(state) * active_E).sum() / active_E.sum()


@dataclass
class HeldThresholdRouter(ThresholdRouter):
    """A router whose thresholds a budget moves together (pi) or also individually to balance the load (loss_free).

    ``deviation`` is a moving average of the standard deviation of an expert's scores, the unit of all changes.
    """

    BUDGET_METHODS: ClassVar[tuple[str, ...]] = ("pi", "loss_free")
    NEEDS_DEVIATION: ClassVar[bool] = True

    def buffers(self, hidden: int, num_experts: int) -> dict[str, TensorSpec]:
        more = {name: TensorSpec(by_budget=True) for name in ("deviation", "error")}
        return super().buffers(hidden, num_experts) | more

    def base_E(self, state: RouterState) -> Tensor | float:
        """The thresholds without their offsets."""
        raise NotImplementedError

    def update(self, state: RouterState, seen: UpdateStatistics, budget: BudgetStep) -> None:
        from dynmoe.routing.budget_rules import balance_change, moving_average

        assert seen.mean_E is not None
        assert seen.variance_E is not None
        active_E = state.active_E
        deviation = ((seen.variance_E * active_E).sum() / active_E.sum()).sqrt().float()
        state.deviation.copy_(moving_average(state.deviation, deviation))
        change_E = -pi_step(state, budget).expand_as(state.offset_E)
        if budget.method == "loss_free":
            rate = budget.rate or _LOSS_FREE_RATE
            change_E = change_E + balance_change(seen.selected_E, active_E, rate).float()
        base_E = self.base_E(state)
        reach = _REACH * state.deviation
        mean_E = seen.mean_E.float()
        moved_E = (base_E + state.offset_E + change_E * state.deviation).clamp(mean_E - reach, mean_E + reach)
        state.offset_E.copy_((moved_E - base_E).where(active_E, state.offset_E))
