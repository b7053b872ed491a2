"""Routers in which each expert compares a token's score with a threshold: top-any, sigmoid, expert thresholds, ReLU."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynmoe.config import ModelConfig
from dynmoe.config.control import BudgetConfig
from dynmoe.moe.calibration import thresholds_for_share
from dynmoe.moe.context import MoEContext
from dynmoe.moe.initialization import named_normal
from dynmoe.moe.routers.base import BudgetController, Counts, LogitRouter, Router
from dynmoe.routing import RoutingPlan, control, expert_threshold, losses, relu, sigmoid_cutoff, top_any
from dynmoe.routing.expert_threshold import kth_largest, move_cutoffs
from dynmoe.routing.relu import adapt_l1

if TYPE_CHECKING:
    from dynmoe.moe.observation import Observation

_BALANCE_RATE = 0.1
# Thresholds stay within this many deviations of the mean score: no further off than any token may be.
_REACH = 6.0


class ThresholdRouter(Router):
    """Thresholds and their state: ``offset_E`` is added to them; ``calibrated``, whether first scores have set it."""

    offset_E: Tensor
    calibrated: Tensor

    def register_thresholds(self, num_experts: int, start: float = 0.0) -> None:
        self.register_buffer("offset_E", torch.full((num_experts,), start))
        self.register_buffer("calibrated", torch.tensor(self.options.initial_experts is None))

    @torch.no_grad()
    def calibrate(self, values_TE: Tensor) -> None:
        """Sets the offsets, once, so that each active expert passes its share of the tokens of all ranks."""
        wanted = self.options.initial_experts
        if not self.context.calibrating or wanted is None or bool(self.calibrated):
            return
        share = min(1.0, wanted / int(self.active_E.sum()))
        self.offset_E.copy_(thresholds_for_share(values_TE.detach(), share, self.context.token_group))
        self.calibrated.fill_(True)

    def score_thresholds_E(self) -> Tensor:
        """The thresholds in force as scores, between 0 and 1."""
        raise NotImplementedError

    @property
    @torch.no_grad()
    def control(self) -> Tensor:
        return (self.score_thresholds_E() * self.active_E).sum() / self.active_E.sum()


class HeldThresholdRouter(BudgetController, ThresholdRouter):
    """Thresholds that a budget moves together (pi), and one by one for the balance (loss_free).

    ``deviation`` is a moving average of how far what is compared with a threshold deviates within an expert.
    """

    compares: ClassVar[bool] = True
    deviation: Tensor

    def register_thresholds(self, num_experts: int, start: float = 0.0) -> None:
        super().register_thresholds(num_experts, start)
        self.register_buffer("deviation", torch.tensor(0.0))
        self.register_controller()

    def base_E(self) -> Tensor | float:
        """What the offsets are added to."""
        raise NotImplementedError

    def hold(self, budget: BudgetConfig, seen: Observation, experts_per_token: Tensor, target: float | None) -> None:
        assert target is not None
        assert seen.mean_E is not None
        assert seen.variance_E is not None
        active_E = self.active_E
        now = ((seen.variance_E * active_E).sum() / active_E.sum()).sqrt().float()
        self.deviation.copy_(control.moving_average(self.deviation, now))
        change_E = -self.pi_change(budget, experts_per_token, target).expand_as(self.offset_E)
        if budget.method == "loss_free":
            rate = budget.rate or _BALANCE_RATE
            change_E = change_E + control.balance_change(seen.selected_E, active_E, rate).float()
        base, reach, mean_E = self.base_E(), _REACH * self.deviation, seen.mean_E.float()
        moved_E = (base + self.offset_E + change_E * self.deviation).clamp(mean_E - reach, mean_E + reach)
        self.offset_E.copy_(torch.where(active_E, moved_E - base, self.offset_E))


class TopAnyRouter(HeldThresholdRouter):
    """Prototypes, trained thresholds, and a temperature that may be trained; experts may come and go.

    ``window_*`` is what adaptation recorded so far.
    """

    window_selected_E: Tensor
    window_unclaimed: Tensor
    window_unclaimed_D: Tensor
    window_tokens: Tensor

    def __init__(self, model: ModelConfig, num_experts: int, seed: int, name: str, context: MoEContext) -> None:
        super().__init__(model, num_experts, seed, name, context)
        prototypes = named_normal((model.hidden, num_experts), model.init_std, seed, f"{name}.prototypes")
        self.prototypes_DE = nn.Parameter(prototypes)
        self.thresholds_E = nn.Parameter(torch.zeros(num_experts))
        fixed = self.options.temperature == "fixed"
        self._base_scale = self.settings.scale * (1.0 if fixed else math.sqrt(model.hidden))
        if self.options.temperature == "learned":
            self.log_scale = nn.Parameter(torch.tensor([math.log(self._base_scale)]))
        self.register_thresholds(num_experts)
        self.register_buffer("window_selected_E", torch.zeros(num_experts, dtype=torch.float64))
        self.register_buffer("window_unclaimed_D", torch.zeros(model.hidden, dtype=torch.float64))
        self.register_buffer("window_unclaimed", torch.zeros((), dtype=torch.float64))
        self.register_buffer("window_tokens", torch.zeros((), dtype=torch.float64))

    @property
    def scale(self) -> Tensor | float:
        """The factor on cosines and thresholds."""
        return self.log_scale.float().exp() if self.options.temperature == "learned" else self._base_scale

    def base_E(self) -> Tensor:
        return self.thresholds_E.float()

    def score_thresholds_E(self) -> Tensor:
        return torch.sigmoid(self.scale * (self.base_E() + self.offset_E))

    @torch.no_grad()
    def compared_TE(self, plan: RoutingPlan) -> Tensor:
        return torch.logit(plan.scores_TE, eps=1e-6) / self.scale

    def route(self, x_TD: Tensor) -> RoutingPlan:
        if self.context.calibrating:
            cosine_TE = F.normalize(x_TD.float(), dim=1) @ F.normalize(self.prototypes_DE.float(), dim=0)
            self.calibrate(cosine_TE - self.base_E())
        options, released = self.options, self.settings.form == "released"
        return top_any(
            x_TD, self.prototypes_DE, self.base_E() + self.offset_E, self.active_E,
            form="released" if released else "paper", training=self.training, scale=self.scale,
            straight_through=options.straight_through, weights=options.weights, renormalize=options.renormalize,
            **self._limits(),
        )  # fmt: skip

    def _loss(self, name: str, plan: RoutingPlan, counts: Counts | None, num_sequences: int) -> Tensor:
        # The released code counts every slot, in use or not.
        counted_E = None if self.settings.form == "released" else self.active_E
        if name == "balance" and self.settings.form == "improved":
            return losses.choice_balance(plan, self.active_E, counts)
        if name == "balance":
            per_route = self.options.balance_per_route
            return losses.gate_balance(plan, counts, active_E=counted_E, per_route=per_route)
        if name == "diversity":
            return losses.diversity(self.prototypes_DE, self.active_E)
        if name == "simplicity":
            return losses.simplicity(self.prototypes_DE, counted_E)
        assert name == "efficiency"
        return losses.efficiency(plan, active_E=counted_E)


class SigmoidRouter(HeldThresholdRouter, LogitRouter):
    """A sigmoid gate for each expert with one cut-off, which a budget moves."""

    def __init__(self, model: ModelConfig, num_experts: int, seed: int, name: str, context: MoEContext) -> None:
        super().__init__(model, num_experts, seed, name, context)
        self.register_thresholds(num_experts)

    def base_E(self) -> float:
        return math.log(self.settings.cutoff / (1.0 - self.settings.cutoff))

    def score_thresholds_E(self) -> Tensor:
        return torch.sigmoid(self.base_E() + self.offset_E)

    @torch.no_grad()
    def compared_TE(self, plan: RoutingPlan) -> Tensor:
        return torch.logit(plan.scores_TE, eps=1e-6)

    def route(self, x_TD: Tensor) -> RoutingPlan:
        logits_TE = self.logits_TE(x_TD)
        self.calibrate(logits_TE - self.base_E())
        renormalize = self.options.renormalize
        return sigmoid_cutoff(logits_TE, self.score_thresholds_E(), renormalize=renormalize, **self._limits())


class ExpertThresholdRouter(ThresholdRouter, LogitRouter):
    """Cut-offs (``offset_E``) that follow the score of each expert's k-th best token."""

    needs_histogram: ClassVar[bool] = True

    def __init__(self, model: ModelConfig, num_experts: int, seed: int, name: str, context: MoEContext) -> None:
        super().__init__(model, num_experts, seed, name, context)
        self.register_thresholds(num_experts, model.router.cutoff)

    def score_thresholds_E(self) -> Tensor:
        return self.offset_E

    def route(self, x_TD: Tensor) -> RoutingPlan:
        logits_TE = self.logits_TE(x_TD)
        self.calibrate(torch.sigmoid(logits_TE))
        return expert_threshold(logits_TE, self.offset_E, renormalize=self.options.renormalize)

    def hold(self, budget: BudgetConfig, seen: Observation, experts_per_token: Tensor, target: float | None) -> None:
        assert target is not None
        assert seen.histogram_EB is not None
        best_E = kth_largest(seen.histogram_EB, seen.tokens * target / self.active_E.sum())
        self.offset_E.copy_(move_cutoffs(self.offset_E, best_E, self.settings.cutoff_decay))


class ReLURouter(LogitRouter):
    """Positive logits; the coefficient ``l1`` of a penalty on them holds the budget."""

    figure: ClassVar[str] = "router_l1"
    l1: Tensor

    def __init__(self, model: ModelConfig, num_experts: int, seed: int, name: str, context: MoEContext) -> None:
        super().__init__(model, num_experts, seed, name, context)
        self.register_buffer("l1", torch.tensor(model.router.l1_start))

    def route(self, x_TD: Tensor) -> RoutingPlan:
        return relu(self.logits_TE(x_TD), max_experts=self.settings.max_experts)

    @property
    def control(self) -> Tensor:
        return self.l1

    @property
    def loss_coefficients(self) -> dict[str, float | Tensor]:
        return {**self.settings.loss_coefficients, "l1": self.l1}

    def _loss(self, name: str, plan: RoutingPlan, counts: Counts | None, num_sequences: int) -> Tensor:
        if name == "l1":
            return losses.l1(plan, self.context.target_experts, counts)
        return super()._loss(name, plan, counts, num_sequences)

    def hold(self, budget: BudgetConfig, seen: Observation, experts_per_token: Tensor, target: float | None) -> None:
        assert target is not None
        # One sparsity over all layers in the paper (eq. 9): budget.scope=global; by layer otherwise.
        self.l1.copy_(adapt_l1(self.l1, experts_per_token, target))
