"""The MoE layer: route, dispatch, experts, combine."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dynmoe.config import ModelConfig
from dynmoe.moe.context import MoEContext, StepState
from dynmoe.moe.dispatcher import DispatchedTokens, TokenDispatcher
from dynmoe.moe.experts import GatedSwiGLU, GroupedExperts, SwiGLU
from dynmoe.moe.replay import ReplayedRoutes
from dynmoe.moe.router import Router
from dynmoe.moe.statistics import LayerStepStats, record, weighted_sum
from dynmoe.ops import attach_loss
from dynmoe.routing import RoutingPlan, apply_capacity, expert_capacity, limit_routes
from dynmoe.routing.update_statistics import pack_update_statistics


class MoELayer(nn.Module):
    """A feed-forward layer in which each token uses a dynamic number of experts.

    Auxiliary losses are attached to the output (see :func:`attach_loss`); statistics stay in the layer until
    :meth:`drain`.

    Args:
        model: configuration of the model.
        layer: index of the decoder layer.
        seed: of the initial weights.
        context: process groups and step state, shared by all layers of the model.
    """

    def __init__(self, model: ModelConfig, layer: int, seed: int, context: MoEContext) -> None:
        # Not super(): a second parent in an engine's subclass has a constructor that would build its own layer.
        nn.Module.__init__(self)
        name = f"layers.{layer}.moe"
        self.layer = layer
        self.settings = model.moe
        self.context = context
        self.num_experts = model.experts_of(layer)
        per_rank = self.num_experts // context.groups.expert_parallel
        first = context.groups.expert_rank * per_rank
        self.router = Router(model, self.num_experts, seed, f"{name}.router", context)
        self.dispatcher = TokenDispatcher(context.groups.expert, context.backend)
        self.experts = GroupedExperts(model, range(first, first + per_rank), seed, f"{name}.experts")
        self.shared: SwiGLU | None = None
        if model.moe.shared_hidden:
            kind = GatedSwiGLU if model.moe.shared_gate else SwiGLU
            self.shared = kind(model, model.moe.shared_hidden, seed, f"{name}.shared")
        self._stats: LayerStepStats | None = None

    def forward(self, x: Tensor, importance: Tensor | None = None) -> Tensor:
        """Maps [..., D] to [..., D]; ``importance`` [...] is for routers that need it."""
        step = self.context.step
        trains = self.training and not step.calibrating
        x_TD = x.reshape(-1, x.shape[-1])
        importance_T = None if importance is None else importance.reshape(-1)
        replayed = None if step.replay is None else step.replay.routes(self.layer, step.micro_batch, x.device)
        selected_TE = None if replayed is None else replayed.selected_TE
        selection = self.router(x_TD, math.prod(x.shape[:-2]), importance_T, selected_TE)
        plan, max_rows, overflowed = self._limited(selection, replayed, step)
        self.dispatcher.count_bytes(trains)
        dispatched = self.dispatcher.dispatch(x_TD, plan, max_rows)
        shared_TD = None if self.shared is None else self.shared(x_TD)  # overlaps with the all-to-all
        outputs_TD = self.experts(self.dispatcher.receive(dispatched), dispatched)
        y_TD = self.dispatcher.combine(outputs_TD, dispatched)
        if shared_TD is not None:
            y_TD = y_TD + shared_TD
        if plan.local_TD is not None:
            y_TD = y_TD + plan.local_TD
        if trains:
            losses = self.router.losses(selection)
            if losses and torch.is_grad_enabled():
                y_TD = attach_loss(y_TD, weighted_sum(losses, self.router.loss_coefficients), step.loss_scale)
            if not step.recomputing:
                self._count(plan, x_TD, losses, dispatched, overflowed, step)
        return y_TD.view_as(x)

    def _limited(
        self, plan: RoutingPlan, replayed: ReplayedRoutes | None, step: StepState
    ) -> tuple[RoutingPlan, int | None, Tensor | None]:
        """Applies capacity and limit, or drops the routes that the replayed run dropped; see :meth:`_within_limit`."""
        if replayed is None:
            return self._within_limit(self._within_capacity(plan), step)
        return plan.mask(replayed.routed_TE), None, None

    def _within_capacity(self, plan: RoutingPlan) -> RoutingPlan:
        """The plan without the routes beyond the capacity of an expert."""
        factor = self.settings.capacity_factor
        # Never in evaluation: the dropped routes depend on the whole batch, including later tokens.
        if factor is None or not self.training:
            return plan
        average = self.router.experts_per_token
        if self.router.spec.budgets:  # another one in each step
            average = torch.full_like(average, self.context.step.target_experts or 0.0)
        num_tokens = plan.routing_map_TE.shape[0]
        # The first step has no moving average yet and uses the routes of these tokens.
        routes = torch.where(average > 0, average * num_tokens, plan.routing_map_TE.sum())
        capacity = expert_capacity(routes, self.router.active_E.sum(), factor)
        return apply_capacity(plan, capacity, self.settings.drop_policy)

    def _within_limit(self, plan: RoutingPlan, step: StepState) -> tuple[RoutingPlan, int | None, Tensor | None]:
        """Applies the limit of mean experts per token, which bounds memory.

        If exceeding it is an error, routes are still dropped, because there is no memory for them, and the gates become
        NaN: on a gradient that is not finite, every engine stops before the optimizer, on all ranks alike.

        Returns:
            The plan; its maximum number of rows, or None without a bound; and whether it exceeded a limit that is an
            error, a bool scalar, or None if it cannot.
        """
        num_tokens = plan.routing_map_TE.shape[0]
        spec = self.router.spec
        per_token = self.settings.max_mean_experts_per_token
        if per_token is None or not self.training:
            return plan, None if spec.fixed_experts is None else spec.fixed_experts * num_tokens, None
        limit = math.ceil(per_token * num_tokens)
        most = num_tokens * spec.max_experts_per_token(self.num_experts)
        if most <= limit:
            return plan, most, None
        limited = limit_routes(plan, limit, self.settings.drop_policy)
        if self.settings.on_overflow == "drop" or step.calibrating:
            return limited, limit, None
        over = plan.routing_map_TE.sum() > limit
        gates_TE = limited.gates_TE.masked_fill(over, math.nan)
        return dataclasses.replace(limited, gates_TE=gates_TE), limit, over

    def _count(
        self, plan: RoutingPlan, x_TD: Tensor, losses: dict[str, Tensor], dispatched: DispatchedTokens,
        overflowed: Tensor | None, step: StepState,
    ) -> None:  # fmt: skip
        router = self.router
        stats = self._stats = LayerStepStats.empty(x_TD.device) if self._stats is None else self._stats
        stats.routed_rows = stats.routed_rows + dispatched.permutation.num_rows
        stats.finite = stats.finite & torch.isfinite(plan.scores_TE.detach()).all()
        if overflowed is not None:
            stats.overflowed = stats.overflowed | overflowed
        if step.recording:
            stats.recorded.append(record(plan, losses, router))
        if step.trace is not None:
            step.trace.add(self.layer, step.micro_batch, plan, dispatched.routes)
        if step.update_statistics is not None:
            wanted = step.update_statistics
            with torch.no_grad():
                state = router.at(step.target_experts)
                compared_TE = router.spec.compared_TE(state, plan) if wanted.deviation else None
                histogram_EC = router.spec.histogram_EC(state, plan) if wanted.histogram else None
            sums = pack_update_statistics(plan, x_TD, compared_TE, wanted, histogram_EC)
            stats.update_sums = sums if stats.update_sums is None else stats.update_sums + sums

    def drain(self) -> LayerStepStats:
        """Returns and clears the statistics of training; waits for the counts that recorded losses need."""
        stats = LayerStepStats.empty(self.router.active_E.device) if self._stats is None else self._stats
        self._stats = None
        stats.sent_bytes = self.dispatcher.take_sent_bytes()
        if stats.recorded:
            self.router.wait_for_counts()
        return stats


@contextmanager
def capture_plans(layers: Sequence[MoELayer]) -> Iterator[list[RoutingPlan]]:
    """Collects the plans of the routers of ``layers`` in forward order; the caller may clear the list."""
    plans: list[RoutingPlan] = []
    hooks = [layer.router.register_forward_hook(lambda module, inputs, plan: plans.append(plan)) for layer in layers]
    try:
        yield plans
    finally:
        for hook in hooks:
            hook.remove()
