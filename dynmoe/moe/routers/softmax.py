"""Routers by softmax probabilities: top-k, top-p, null experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from dynmoe.config import ModelConfig
from dynmoe.config.control import BudgetConfig
from dynmoe.moe.context import MoEContext
from dynmoe.moe.routers.base import BudgetController, Counts, LogitRouter
from dynmoe.routing import RoutingPlan, control, null_experts, top_k, top_p
from dynmoe.routing.null_experts import null_balance

if TYPE_CHECKING:
    from dynmoe.moe.observation import Observation

_BIAS_RATE = 1e-3


class SlotRouter(LogitRouter):
    """k slots for every token."""

    figure: ClassVar[str] = "router_k"

    @property
    def control(self) -> Tensor:
        return torch.full((), float(self.settings.k), device=self.active_E.device)


class TopKRouter(SlotRouter):
    """An expert in every slot; ``bias_E`` is added where they are chosen, and moved by loss-free balancing."""

    bias_E: Tensor

    def __init__(self, model: ModelConfig, num_experts: int, seed: int, name: str, context: MoEContext) -> None:
        super().__init__(model, num_experts, seed, name, context)
        self.register_buffer("bias_E", torch.zeros(num_experts))

    @property
    def fixed_experts(self) -> int:
        return self.settings.k

    def route(self, x_TD: Tensor) -> RoutingPlan:
        renormalize = self.options.renormalize
        return top_k(self.logits_TE(x_TD), self.settings.k, renormalize=renormalize, bias_E=self.bias_E)

    def hold(self, budget: BudgetConfig, seen: Observation, experts_per_token: Tensor, target: float | None) -> None:
        self.bias_E.add_(control.bias_change(seen.selected_E, budget.rate or _BIAS_RATE).float())


class TopPRouter(BudgetController, LogitRouter):
    """As few experts as reach the probability mass ``p``, which a budget moves."""

    figure: ClassVar[str] = "router_p"
    p: Tensor

    def __init__(self, model: ModelConfig, num_experts: int, seed: int, name: str, context: MoEContext) -> None:
        super().__init__(model, num_experts, seed, name, context)
        self.register_buffer("p", torch.tensor(model.router.p))
        self.register_controller()

    def route(self, x_TD: Tensor) -> RoutingPlan:
        return self.choose(self.logits_TE(x_TD))

    def choose(self, logits_TE: Tensor) -> RoutingPlan:
        """The plan of tokens with these logits, at the present p."""
        form = "released" if self.settings.form == "released" else "paper"
        return top_p(logits_TE, self.p, form=form, renormalize=self.options.renormalize, **self._limits())

    @torch.no_grad()
    def fit(self, logits_TE: Tensor, experts_per_token: float) -> None:
        """Sets p to the smallest at which tokens with these logits use ``experts_per_token`` in the mean, or more."""
        low, high = 0.0, 1.0
        for _ in range(30):
            middle = (low + high) / 2
            self.p.fill_(middle)
            enough = float(self.choose(logits_TE).routing_map_TE.sum()) >= experts_per_token * len(logits_TE)
            low, high = (low, middle) if enough else (middle, high)
        self.p.fill_(high)

    @property
    def control(self) -> Tensor:
        return self.p

    def hold(self, budget: BudgetConfig, seen: Observation, experts_per_token: Tensor, target: float | None) -> None:
        assert target is not None
        self.p.copy_(control.shift_probability(self.p, self.pi_change(budget, experts_per_token, target)))


class NullExpertRouter(SlotRouter):
    """Some of the slots go to experts that do nothing."""

    def route(self, x_TD: Tensor) -> RoutingPlan:
        settings = self.settings
        return null_experts(self.logits_TE(x_TD), settings.k, settings.num_null, renormalize=self.options.renormalize)

    def _loss(self, name: str, plan: RoutingPlan, counts: Counts | None, num_sequences: int) -> Tensor:
        if name == "balance":
            return null_balance(plan, self.settings.k, self.settings.num_null, counts)
        return super()._loss(name, plan, counts, num_sequences)
