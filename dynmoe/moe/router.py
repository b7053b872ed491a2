"""The router of a layer: the tensors that its spec describes, and its losses with counts over ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dynmoe.config import ModelConfig
from dynmoe.moe.calibration import thresholds_for_share
from dynmoe.moe.context import MoEContext
from dynmoe.moe.initialization import named_normal
from dynmoe.moe.loss_counts import CountedLossInputs, LossCounts
from dynmoe.moe.scope import RankScope
from dynmoe.ops import linear_fp32
from dynmoe.routers.base import RouterState, at_budget, without_shape
from dynmoe.routing import RoutingPlan
from dynmoe.routing.scope import TokenScope

_ROUNDS = 8  # of corrections of calibrated thresholds


def initially_active(num_experts: int, wanted: int | None, spread: bool) -> Tensor:
    """Mask of the initially active slots: the first ones, or with ``spread`` evenly over slots and thus ranks."""
    active_E = torch.zeros(num_experts, dtype=torch.bool)
    count = num_experts if wanted is None else wanted
    active_E[[index * num_experts // count if spread else index for index in range(count)]] = True
    return active_E


class BudgetState:
    """The state of a router at one of several budgets, or between two of them (see ``RouterState``).

    Args:
        router: the router; its buffers have a value for each budget.
        target_experts: experts per token.
    """

    def __init__(self, router: Router, target_experts: float) -> None:
        self._router = router
        self.target_experts = target_experts

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._router, name)
        if name not in self._router.by_budget:
            return value
        return at_budget(value, self._router.spec.budgets, self.target_experts)


class Router(nn.Module):
    """Maps hidden states to a :class:`RoutingPlan`, in fp32 arithmetic regardless of the precision of the weights.

    ``model.router`` (:class:`dynmoe.routers.RouterSpec`) describes the parameters and buffers, how they route and how
    they are updated. Every router has two more buffers: ``active_E`` (mask of the active slots) and
    ``experts_per_token`` (a moving average from which capacities are computed; 0 before the first step).

    Args:
        model: configuration of the model.
        num_experts: number of expert slots of this layer.
        seed: of the initial weights.
        name: prefix of this module's parameter names in the whole model.
        context: process groups and step state.
    """

    active_E: Tensor
    experts_per_token: Tensor
    scope: TokenScope
    by_budget: frozenset[str]
    importance_T: Tensor | None

    def __init__(self, model: ModelConfig, num_experts: int, seed: int, name: str, context: MoEContext) -> None:
        super().__init__()
        self.spec = model.router.resolved
        self._losses = self.spec.losses
        self._coefficients = self.spec.loss_coefficients()
        self.context = context
        self.scope = RankScope(1, context.groups)
        self._loss_counts = LossCounts(context)
        spread = self.spec.variant != "released"
        self.register_buffer("active_E", initially_active(num_experts, model.moe.active_at_start, spread))
        self.register_buffer("experts_per_token", torch.tensor(0.0))
        for key, tensor in self.spec.parameters(model.hidden, num_experts).items():
            if tensor.initial is None:
                values = named_normal(tensor.shape, model.init_std, seed, f"{name}.{without_shape(key)}")
            else:
                values = torch.full(tensor.shape, tensor.initial)
            self.register_parameter(key, nn.Parameter(values))
        buffers = self.spec.stored_buffers(model.hidden, num_experts)
        self.by_budget = frozenset(key for key, tensor in buffers.items() if tensor.by_budget and self.spec.budgets)
        for key, tensor in buffers.items():
            assert tensor.initial is not None
            self.register_buffer(key, torch.full(tensor.shape, tensor.initial, dtype=getattr(torch, tensor.dtype)))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        """Keeps the dtype of buffers when an engine casts the whole module to bf16."""
        buffers = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in buffers.items():
            moved = self._buffers[name]
            if buffer is not None and moved is not None:
                self._buffers[name] = buffer.to(moved.device)
        return self

    def linear(self, x_TD: Tensor, weight_ED: Tensor) -> Tensor:
        return linear_fp32(x_TD, weight_ED)

    @property
    def target_experts(self) -> float | None:
        return self.context.step.target_experts

    def at(self, target_experts: float | None) -> RouterState:
        """The state for the experts per token that the budget targets; without one, for the most of several."""
        budgets = self.spec.budgets
        return BudgetState(self, target_experts or budgets[-1]) if budgets else self

    def forward(
        self, x_TD: Tensor, num_sequences: int = 1, importance_T: Tensor | None = None,
        selected_TE: Tensor | None = None,
    ) -> RoutingPlan:  # fmt: skip
        """The plan of these tokens.

        Args:
            x_TD: hidden states.
            num_sequences: number of sequences; tokens of a sequence are contiguous.
            importance_T: see ``RouterState``.
            selected_TE: bool; replaces the router's own selection.
        """
        self.importance_T = importance_T
        self.scope = RankScope(num_sequences, self.context.groups)
        with torch.autocast(x_TD.device.type, enabled=False):  # also in a user's program that casts
            if self.context.step.calibrating:
                self._calibrate(x_TD)
            return self.spec.plan(self.at(self.target_experts), x_TD, selected_TE)

    @property
    @torch.no_grad()
    def control_value(self) -> Tensor:
        """See :meth:`RouterSpec.control_value`."""
        return self.spec.control_value(self.at(self.target_experts))

    @property
    def is_calibrated(self) -> Tensor | None:
        """True once the thresholds are calibrated, a bool scalar; None for a router without thresholds."""
        return self._buffers.get("calibrated")

    @torch.no_grad()
    def _calibrate(self, x_TD: Tensor) -> None:
        """Sets the offsets, once, so that each active expert takes its share of the tokens of all ranks."""
        if self.is_calibrated is None or bool(self.is_calibrated):
            return
        initial = self.spec.initial_experts or self.target_experts  # type: ignore[attr-defined]
        assert initial is not None
        for experts in self.spec.budgets or [initial]:
            self._fit_offsets(self.at(experts), x_TD, experts)
        self.is_calibrated.fill_(True)

    def _fit_offsets(self, state: RouterState, x_TD: Tensor, experts: float) -> None:
        """Sets the offsets with which tokens select ``experts`` on average, the same share of the tokens each.

        A token that passes a threshold selects the expert only if it is in the token's groups, so with groups the share
        is corrected by what tokens select.
        """
        values_TE = self.spec.calibration_TE(state, x_TD)
        share = min(1.0, experts / int(self.active_E.sum()))
        state.offset_E.copy_(thresholds_for_share(values_TE, share, self.context.groups.tokens))
        for _ in range(_ROUNDS if self.spec.n_group > 1 else 0):
            map_TE = self.spec.route(state, x_TD).selected_map_TE
            counts = values_TE.new_tensor([int(map_TE.sum()), len(map_TE)], dtype=torch.float64)
            routes, tokens = self.scope.sum(counts).tolist()
            share = min(1.0, share * experts * tokens / max(routes, 1.0))
            state.offset_E.copy_(thresholds_for_share(values_TE, share, self.context.groups.tokens))

    @property
    def loss_coefficients(self) -> dict[str, Any]:
        """The coefficient of each active auxiliary loss, a number or a tensor."""
        has_state = len(self._coefficients) < len(self._losses)
        return self.spec.loss_coefficients(self.at(self.target_experts)) if has_state else self._coefficients

    def losses(self, plan: RoutingPlan) -> dict[str, Tensor]:
        """Each active auxiliary loss, without its coefficient.

        The value of a loss with counts over ranks is NaN until the backward pass or :meth:`wait_for_counts` has waited
        for the counts. ``plan`` is that of the latest forward pass, before capacity drops routes.
        """
        state = self.at(self.target_experts)
        inputs = CountedLossInputs(self.spec, state, plan, self.scope.num_sequences, self._loss_counts)
        with torch.autocast(plan.scores_TE.device.type, enabled=False):
            return {name: loss(inputs) for name, loss in self._losses.items()}

    def wait_for_counts(self) -> None:
        """Waits for the counts of this step's forward passes, which fills in the values of their losses."""
        self._loss_counts.wait()
