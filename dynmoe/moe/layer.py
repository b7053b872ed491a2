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
from dynmoe.moe.experts import GroupedExperts, SwiGLU
from dynmoe.moe.router import Router
from dynmoe.moe.statistics import LayerStepStats, record, weighted_sum
from dynmoe.ops import attach_loss
from dynmoe.routing import RoutingPlan, apply_capacity, apply_ceiling, expert_capacity
from dynmoe.routing.control_statistics import pack_control_statistics


class MoELayer(nn.Module):
    """A feed-forward layer in which each token takes the experts it needs.

    Auxiliary losses travel with the output (see :func:`attach_loss`); counts stay in the layer until :meth:`drain`.

    Args:
        model: the model's configuration.
        layer: index of the decoder layer.
        seed: of the initial weights.
        context: process groups and step state, shared by all layers of the model.
    """

    def __init__(self, model: ModelConfig, layer: int, seed: int, context: MoEContext) -> None:
        # Not super(): an engine's subclass may have a second parent, whose constructor builds a layer of its own.
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
            self.shared = SwiGLU(model, model.moe.shared_hidden, seed, f"{name}.shared")
        self._stats: LayerStepStats | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., D]: route, dispatch, experts, combine."""
        step = self.context.step
        trains = self.training and not step.calibrating
        x_TD = x.reshape(-1, x.shape[-1])
        selection = self.router(x_TD)
        plan, most_rows, overflowed = self._within_limit(self._within_capacity(selection), step)
        self.dispatcher.count_bytes = trains
        dispatched = self.dispatcher.dispatch(x_TD, plan, most_rows)
        shared_TD = None if self.shared is None else self.shared(x_TD)  # while the tokens travel
        outputs_TD = self.experts(self.dispatcher.receive(dispatched), dispatched)
        y_TD = self.dispatcher.combine(outputs_TD, dispatched)
        if shared_TD is not None:
            y_TD = y_TD + shared_TD
        if trains:
            losses = self.router.losses(selection, math.prod(x.shape[:-2]))
            if losses and torch.is_grad_enabled():
                y_TD = attach_loss(y_TD, weighted_sum(losses, self.router.loss_coefficients), step.loss_scale)
            if not step.recomputing:
                self._count(plan, x_TD, losses, dispatched, overflowed, step)
        return y_TD.view_as(x)

    def _within_capacity(self, plan: RoutingPlan) -> RoutingPlan:
        """The plan without routes beyond the capacity of an expert."""
        factor = self.settings.capacity_factor
        # Not in evaluation: which routes are dropped depends on the whole batch, later tokens included.
        if factor is None or not self.training:
            return plan
        average = self.router.experts_per_token
        num_tokens = plan.routing_map_TE.shape[0]
        # In the first step nothing was observed yet but these tokens themselves.
        routes = torch.where(average > 0, average * num_tokens, plan.routing_map_TE.sum())
        capacity = expert_capacity(routes, self.router.active_E.sum(), factor)
        return apply_capacity(plan, capacity, self.settings.drop_policy)

    def _within_limit(self, plan: RoutingPlan, step: StepState) -> tuple[RoutingPlan, int | None, Tensor | None]:
        """The plan within the limit of experts per token, which bounds memory.

        Where exceeding it is an error, routes are dropped all the same, as there is no room for them, and the gates
        become NaN: every engine stops before the optimizer at a gradient that is not finite, on all ranks alike.

        Returns:
            The plan; the most rows that it can have, or None where nothing bounds them; and whether it exceeded a limit
            that is an error, a bool scalar, or None where that cannot be.
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
        bounded = apply_ceiling(plan, limit, self.settings.drop_policy)
        if self.settings.on_overflow == "drop" or step.calibrating:
            return bounded, limit, None
        over = plan.routing_map_TE.sum() > limit
        gates_TE = bounded.gates_TE.masked_fill(over, math.nan)
        return dataclasses.replace(bounded, gates_TE=gates_TE), limit, over

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
            coefficients = router.loss_coefficients
            stats.recorded.append(record(plan, losses, coefficients, router.control_value, router.active_E))
        if step.trace is not None:
            step.trace.add(self.layer, step.micro_batch, plan, dispatched.routes)
        if step.control is not None:
            with torch.no_grad():
                compared_TE = router.spec.compared_TE(router, plan) if step.control.deviation else None
            seen = pack_control_statistics(plan, x_TD, compared_TE, step.control)
            stats.control = seen if stats.control is None else stats.control + seen

    def drain(self) -> LayerStepStats:
        """What was counted in training since the last call; waits for the counts that recorded losses need."""
        stats = LayerStepStats.empty(self.router.active_E.device) if self._stats is None else self._stats
        self._stats = None
        stats.sent_bytes = self.dispatcher.take_sent_bytes()
        if stats.recorded:
            self.router.wait_for_counts()
        return stats


@contextmanager
def keeping_plans(layers: Sequence[MoELayer]) -> Iterator[list[RoutingPlan]]:
    """Collects the plans that the routers of these layers make, in their order; its reader may clear the list."""
    plans: list[RoutingPlan] = []
    hooks = [layer.router.register_forward_hook(lambda module, inputs, plan: plans.append(plan)) for layer in layers]
    try:
        yield plans
    finally:
        for hook in hooks:
            hook.remove()
