"""What every router module has: state that keeps its precision, counts over ranks, auxiliary losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dynmoe.config import ModelConfig
from dynmoe.config.control import BudgetConfig
from dynmoe.moe.context import MoEContext
from dynmoe.moe.counts import CountsUnderWay
from dynmoe.moe.initialization import named_normal
from dynmoe.ops import linear_fp32
from dynmoe.routing import RoutingCounts, RoutingPlan, control, losses

if TYPE_CHECKING:
    from dynmoe.moe.observation import Observation

Counts = RoutingCounts | CountsUnderWay


def active_at_start(num_experts: int, wanted: int | None, spread: bool) -> Tensor:
    """Mask of the slots in use at the start: the first ones, or spread evenly so that every rank has its share."""
    active_E = torch.zeros(num_experts, dtype=torch.bool)
    count = num_experts if wanted is None else wanted
    active_E[[place * num_experts // count if spread else place for place in range(count)]] = True
    return active_E


class Router(nn.Module):
    """Maps hidden states to a :class:`RoutingPlan`, in fp32 arithmetic whatever the precision of the weights.

    A subclass for each kind of router says how it routes, what decides its number of experts per token, and how that
    is moved between steps. What is moved outside autograd lies in buffers, in fp32 whatever the precision of the model,
    and goes into checkpoints: here ``active_E`` (the slots in use) and ``experts_per_token`` (a moving average that
    capacities come from, 0 before the first step).

    Args:
        model: router kind and its settings.
        num_experts: expert slots of this layer.
        seed: of the initial weights.
        name: prefix of this module's parameter names in the whole model.
        context: names the ranks whose tokens the auxiliary losses count.
    """

    # Name of ``control`` among the metrics.
    figure: ClassVar[str] = "router_threshold_mean"
    # Whether controllers move thresholds by how far the scores deviate, and whether they need counts of scores.
    compares: ClassVar[bool] = False
    needs_histogram: ClassVar[bool] = False

    active_E: Tensor
    experts_per_token: Tensor

    def __init__(self, model: ModelConfig, num_experts: int, seed: int, name: str, context: MoEContext) -> None:
        super().__init__()
        self.settings, self.options, self.context = model.router, model.router.options, context
        # By micro-batch of the step in progress.
        self._step_counts: list[Counts] = []
        self._sequence_counts: list[CountsUnderWay] = []
        self._finite: Tensor | None = None
        spread = self.settings.form != "released"
        self.register_buffer("active_E", active_at_start(num_experts, model.moe.active_at_start, spread))
        self.register_buffer("experts_per_token", torch.tensor(0.0))

    def route(self, x_TD: Tensor) -> RoutingPlan:
        """The plan of this kind of router."""
        raise NotImplementedError

    @property
    def control(self) -> Tensor:
        """What decides how many experts a token gets, a scalar without gradient: k, p, L1 or the mean threshold."""
        raise NotImplementedError

    @property
    def fixed_experts(self) -> int | None:
        """Experts of every token, where the kind of router fixes them; None where they are dynamic."""
        return None

    def compared_TE(self, plan: RoutingPlan) -> Tensor:
        """What a plan of this router compared with its thresholds, without gradient; where ``compares`` is True."""
        raise NotImplementedError

    def hold(self, budget: BudgetConfig, seen: Observation, experts_per_token: Tensor, target: float | None) -> None:
        """Moves this router's state after a step that saw ``seen``, towards ``target`` experts per token.

        ``experts_per_token`` is what counts against the target: this layer's, or the mean over layers.
        """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        """Moves with the module, but keeps the precision of its state: engines cast whole modules to bf16."""
        state = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in state.items():
            moved = self._buffers[name]
            if buffer is not None and moved is not None:
                self._buffers[name] = buffer.to(moved.device)
        return self

    def forward(self, x_TD: Tensor) -> RoutingPlan:
        plan = self.route(x_TD)
        if self.training and not self.context.recomputing:
            finite = torch.isfinite(plan.scores_TE.detach()).all()
            self._finite = finite if self._finite is None else self._finite & finite
        return plan

    def take_finite(self) -> Tensor:
        """Whether all scores since the last call were finite numbers; a bool scalar."""
        finite, self._finite = self._finite, None
        return torch.ones_like(self.active_E[0]) if finite is None else finite

    def _limits(self) -> dict[str, Any]:
        return {"min_experts": self.options.min_experts, "max_experts": self.settings.max_experts}

    @property
    def loss_coefficients(self) -> dict[str, float | Tensor]:
        """Coefficient of every auxiliary loss in force, by the names of ``RouterConfig.loss_names``."""
        return {**self.settings.loss_coefficients}

    def losses(self, plan: RoutingPlan, num_sequences: int = 1) -> dict[str, Tensor]:
        """Every auxiliary loss in force, without its coefficient; its counts are those of the configured scope.

        A loss that counts over ranks may be differentiated at once: the backward pass waits for the counts. Its value
        is NaN until then, or until :meth:`wait_for_counts`.

        Args:
            plan: of this rank's tokens, before capacity drops routes.
            num_sequences: sequences that the tokens belong to, one after the other.
        """
        names = self.settings.loss_names
        counts = self._counts(plan) if "balance" in names or "l1" in names else None
        return {name: self._loss(name, plan, counts, num_sequences) for name in names}

    def wait_for_counts(self) -> None:
        """Gives the losses of this step's passes their values."""
        for counts in (*self._step_counts, *self._sequence_counts):
            if isinstance(counts, CountsUnderWay):
                counts.get()

    def _loss(self, name: str, plan: RoutingPlan, counts: Counts | None, num_sequences: int) -> Tensor:
        per_route = self.options.balance_per_route
        if name == "balance" and self.settings.balance_scope == "sequence":
            return losses.sequence_balance(plan, *self._of_sequences(plan, num_sequences), per_route=per_route)
        if name == "balance":
            return losses.load_balance(plan, counts, per_route=per_route)
        return {"entropy": losses.entropy, "z": losses.z_loss}[name](plan)

    def _of_sequences(self, plan: RoutingPlan, num_sequences: int) -> tuple[Tensor | CountsUnderWay, int]:
        """Counts of whole sequences, and the number of ranks that each is spread over."""
        selected_BE, sums = losses.sequence_counts(plan, num_sequences), self.context.sequence_counts
        if sums is None:
            return selected_BE, 1
        micro_batch = self.context.micro_batch
        if not self.context.recomputing:
            under_way = sums.add(selected_BE, lambda selected_BE: selected_BE)
            self._sequence_counts = [*self._sequence_counts[:micro_batch], under_way]
        return self._sequence_counts[micro_batch], dist.get_world_size(self.context.sequence_group)

    def _counts(self, plan: RoutingPlan) -> Counts:
        """Counts of the configured scope; those of the step so far grow with each of its micro-batches."""
        own, micro_batch = RoutingCounts.of(plan), self.context.micro_batch
        if self.settings.balance_scope != "global_batch":
            return own
        if not self.context.recomputing:  # a repeated pass finds its counts as they were
            earlier = self._step_counts[:micro_batch]
            self._step_counts = [*earlier, self._added(own, earlier[-1] if earlier else None)]
        return self._step_counts[micro_batch]

    def _added(self, own: RoutingCounts, before: Counts | None) -> Counts:
        """The counts of a pass over all ranks, and of the passes before it."""
        sums = self.context.token_counts
        if sums is None:
            assert not isinstance(before, CountsUnderWay)
            return own if before is None else before + own
        assert not isinstance(before, RoutingCounts)
        ranks = dist.get_world_size(self.context.token_group)

        def read(packed: Tensor) -> RoutingCounts:
            of_pass = RoutingCounts.unpack(packed, ranks)
            return of_pass if before is None else before.get() + of_pass

        return sums.add(own.pack(), read)


class LogitRouter(Router):
    """A router whose scores come from logits, x · W."""

    def __init__(self, model: ModelConfig, num_experts: int, seed: int, name: str, context: MoEContext) -> None:
        super().__init__(model, num_experts, seed, name, context)
        rows = num_experts + (model.router.num_null if model.router.kind == "null_experts" else 0)
        self.weight_ED = nn.Parameter(named_normal((rows, model.hidden), model.init_std, seed, f"{name}.weight"))

    def logits_TE(self, x_TD: Tensor) -> Tensor:
        return linear_fp32(x_TD, self.weight_ED)


class BudgetController(nn.Module):
    """A proportional-integral controller's memory, for routers that are held by one."""

    error: Tensor

    def register_controller(self) -> None:
        self.register_buffer("error", torch.tensor(0.0))

    def pi_change(self, budget: BudgetConfig, experts_per_token: Tensor, target: float) -> Tensor:
        """How far the control variable is to move, on its scale; positive for more experts. Call once a step."""
        error = control.budget_error(experts_per_token, target)
        change = control.pi_change(error, self.error, budget.proportional, budget.integral)
        self.error.copy_(error)
        return change
