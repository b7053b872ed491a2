"""The MoE layer: route, dispatch, experts, combine."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor, nn

from dynmoe.config import ModelConfig
from dynmoe.moe.context import MoEContext
from dynmoe.moe.dispatcher import DispatchedTokens, TokenDispatcher
from dynmoe.moe.experts import GroupedExperts, SwiGLU
from dynmoe.moe.observation import observe
from dynmoe.moe.routers import make_router
from dynmoe.moe.statistics import PassStatistics, record, weighted_sum
from dynmoe.ops import attach_loss
from dynmoe.routing import RoutingPlan, apply_capacity, apply_ceiling, expert_capacity


class MoELayer(nn.Module):
    """A feed-forward layer in which each token takes the experts it needs.

    Auxiliary losses travel with the output (see :func:`attach_loss`); statistics stay in the layer until
    :meth:`take_statistics` is called.

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
        self.layer, self.settings, self.context = layer, model.moe, context
        self.num_experts = model.experts_of(layer)
        per_rank = self.num_experts // context.expert_parallel
        local = range(context.expert_rank * per_rank, (context.expert_rank + 1) * per_rank)
        self.router = make_router(model, self.num_experts, seed, f"{name}.router", context)
        self.dispatcher = TokenDispatcher(context.expert_group, context.backend)
        self.experts = GroupedExperts(model, local, seed, f"{name}.experts")
        self.shared: SwiGLU | None = None
        if model.moe.shared_hidden:
            self.shared = SwiGLU(model, model.moe.shared_hidden, seed, f"{name}.shared")
        self._routed_rows: Tensor | None = None
        self._over_ceiling: Tensor | None = None
        self._statistics: list[PassStatistics] = []
        self._observed: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., D]: route, dispatch, experts, combine."""
        x_TD = x.reshape(-1, x.shape[-1])
        selection = self.router(x_TD)
        plan, most_rows = self._bound(self._drop_beyond_capacity(selection))
        if self.dispatcher.wire is not None:
            self.dispatcher.wire.counting = self.training and not self.context.calibrating
        dispatched = self.dispatcher.dispatch(x_TD, plan, most_rows)
        shared_TD = None if self.shared is None else self.shared(x_TD)  # while the tokens travel
        outputs_TD = self.experts(self.dispatcher.receive(dispatched), dispatched)
        y_TD = self.dispatcher.combine(outputs_TD, dispatched)
        if shared_TD is not None:
            y_TD = y_TD + shared_TD
        losses = self._auxiliary(selection, math.prod(x.shape[:-2]))
        if losses and torch.is_grad_enabled():
            total = weighted_sum(losses, self.router.loss_coefficients)
            y_TD = attach_loss(y_TD, total, self.context.loss_scale)
        self._count(plan, x_TD, losses, dispatched)
        return y_TD.view_as(x)

    def _auxiliary(self, selection: RoutingPlan, num_sequences: int) -> dict[str, Tensor]:
        """Auxiliary losses of a training pass."""
        if not self.training or self.context.calibrating:
            return {}
        return self.router.losses(selection, num_sequences)

    def _drop_beyond_capacity(self, plan: RoutingPlan) -> RoutingPlan:
        factor = self.settings.capacity_factor
        # Not in evaluation: which routes are dropped depends on the whole batch, the tokens to come included.
        if factor is None or not self.training:
            return plan
        average, num_tokens = self.router.experts_per_token, plan.routing_map_TE.shape[0]
        # In the first step nothing was observed yet but these tokens themselves.
        routes = torch.where(average > 0, average * num_tokens, plan.routing_map_TE.sum())
        capacity = expert_capacity(routes, self.router.active_E.sum(), factor)
        return apply_capacity(plan, capacity, self.settings.drop_policy)

    def _bound(self, plan: RoutingPlan) -> tuple[RoutingPlan, int | None]:
        """The plan within the memory's ceiling, and the most rows that it can have; None where nothing bounds them.

        Where routes beyond the ceiling are an error they are dropped all the same, as there is no room for them, and
        the gates become NaN: every engine stops before the optimizer at a gradient that is not finite, on all ranks
        alike.
        """
        num_tokens, fixed, per_token = plan.routing_map_TE.shape[0], self.router.fixed_experts, self.settings.ceiling
        if per_token is None or not self.training:
            return plan, None if fixed is None else fixed * num_tokens
        ceiling = math.ceil(per_token * num_tokens)
        most = num_tokens * (fixed or self.router.settings.max_experts or self.num_experts)
        if most <= ceiling:  # cannot be passed
            return plan, most
        bounded = apply_ceiling(plan, ceiling, self.settings.drop_policy)
        if self.settings.at_ceiling == "error" and not self.context.calibrating:
            over = plan.routing_map_TE.sum() > ceiling
            self._over_ceiling = over if self._over_ceiling is None else self._over_ceiling | over
            bounded = dataclasses.replace(bounded, gates_TE=bounded.gates_TE.masked_fill(over, math.nan))
        return bounded, ceiling

    def _count(self, plan: RoutingPlan, x_TD: Tensor, losses: dict[str, Tensor], dispatched: DispatchedTokens) -> None:
        context, num_rows = self.context, dispatched.permutation.num_rows
        if context.recomputing or context.calibrating or not self.training:
            return
        self._routed_rows = num_rows.long() if self._routed_rows is None else self._routed_rows + num_rows
        if context.recording:
            router = self.router
            self._statistics.append(record(plan, losses, router.loss_coefficients, router.control, router.active_E))
        if context.trace is not None:
            context.trace.add(self.layer, context.micro_batch, plan, dispatched.routes)
        if context.observing is not None:
            seen = observe(self.router, plan, x_TD, context.observing)
            self._observed = seen if self._observed is None else self._observed + seen

    def take_routed_rows(self) -> Tensor:
        """Rows that the experts of this rank computed since the last call, int64 scalar; counted in training always."""
        rows, self._routed_rows = self._routed_rows, None
        return self.router.active_E.new_zeros((), dtype=torch.long) if rows is None else rows

    def take_over_ceiling(self) -> Tensor:
        """Whether tokens of this rank wanted more rows than the ceiling since the last call; a bool scalar."""
        over, self._over_ceiling = self._over_ceiling, None
        return torch.zeros_like(self.router.active_E[0]) if over is None else over

    def take_sent_bytes(self) -> int:
        """Bytes that left this rank for the experts of others and back in training, since the last call."""
        wire = self.dispatcher.wire
        if wire is None:
            return 0
        sent, wire.sent_bytes = wire.sent_bytes, 0
        return sent

    def take_observed(self) -> Tensor:
        """The vector of :func:`observe`, summed over the forward passes since the last call.

        Raises:
            RuntimeError: nothing was observed.
        """
        if self._observed is None:
            raise RuntimeError(f"layer {self.layer} observed nothing: set context.observing before the step")
        seen, self._observed = self._observed, None
        return seen

    @property
    def has_statistics(self) -> bool:
        return bool(self._statistics)

    def take_statistics(self) -> Tensor:
        """The vector of :class:`PassStatistics`, summed over the forward passes since the last call.

        Waits for the counts that losses need.

        Raises:
            RuntimeError: nothing was recorded.
        """
        if not self._statistics:
            raise RuntimeError(f"layer {self.layer} recorded no statistics: set context.recording before the step")
        self.router.wait_for_counts()
        total = torch.stack([seen.vector() for seen in self._statistics]).sum(dim=0)
        self._statistics.clear()
        return total
