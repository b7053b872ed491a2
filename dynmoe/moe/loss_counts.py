"""The counts that auxiliary losses need, over the ranks and micro-batches of their scope."""

from __future__ import annotations

import functools

import torch.distributed as dist
from torch import Tensor

from dynmoe.moe.context import MoEContext
from dynmoe.moe.counts import CountsUnderWay
from dynmoe.routers.base import LossInputs, RouterSpec, RouterState
from dynmoe.routing import RoutingCounts, RoutingPlan, losses

Counts = RoutingCounts | CountsUnderWay


class LossCounts:
    """Counts of one layer in the step in progress, by micro-batch: a repeated pass finds those of the first one."""

    def __init__(self, context: MoEContext) -> None:
        self._context = context
        self._batches: list[Counts] = []
        self._sequences: list[CountsUnderWay] = []

    def wait(self) -> None:
        """Waits for all counts that are under way, and gives the losses made of them their values."""
        for counts in (*self._batches, *self._sequences):
            if isinstance(counts, CountsUnderWay):
                counts.get()

    def of_batch(self, plan: RoutingPlan, scope: str) -> Counts:
        """Counts of the scope; those of the global batch grow with each of its micro-batches."""
        own = RoutingCounts.of(plan)
        if scope != "global_batch":
            return own
        micro_batch = self._context.step.micro_batch
        if not self._context.step.recomputing:
            earlier = self._batches[:micro_batch]
            self._batches = [*earlier, self._added(own, earlier[-1] if earlier else None)]
        return self._batches[micro_batch]

    def _added(self, own: RoutingCounts, before: Counts | None) -> Counts:
        """The counts of a pass over all ranks, and of the passes before it."""
        sums = self._context.token_counts
        if sums is None:
            assert not isinstance(before, CountsUnderWay)
            return own if before is None else before + own
        assert not isinstance(before, RoutingCounts)
        ranks = dist.get_world_size(self._context.groups.tokens)

        def read(packed: Tensor) -> RoutingCounts:
            of_pass = RoutingCounts.unpack(packed, ranks)
            return of_pass if before is None else before.get() + of_pass

        return sums.add(own.pack(), read)

    def of_sequences(self, plan: RoutingPlan, num_sequences: int) -> tuple[Tensor | CountsUnderWay, int]:
        """Counts of whole sequences, and the number of ranks that each is spread over."""
        selected_BE = losses.sequence_counts(plan, num_sequences)
        sums = self._context.sequence_counts
        if sums is None:
            return selected_BE, 1
        micro_batch = self._context.step.micro_batch
        if not self._context.step.recomputing:
            under_way = sums.add(selected_BE, lambda selected_BE: selected_BE)
            self._sequences = [*self._sequences[:micro_batch], under_way]
        return self._sequences[micro_batch], dist.get_world_size(self._context.groups.sequence)


class CountedLossInputs(LossInputs):
    """Inputs of losses whose counts are those of the configured scope, over all ranks.

    Args:
        num_sequences: sequences that the tokens belong to, one after the other.
        counts: of the layer.
    """

    def __init__(
        self, spec: RouterSpec, state: RouterState, plan: RoutingPlan, num_sequences: int, counts: LossCounts,
        target_experts: float,
    ) -> None:  # fmt: skip
        super().__init__(spec, state, plan)
        self.target_experts = target_experts
        self._num_sequences = num_sequences
        self._counts = counts

    @functools.cached_property
    def counts(self) -> Counts:
        return self._counts.of_batch(self.plan, self.spec.balance_scope)

    @functools.cached_property
    def sequence_counts(self) -> tuple[Tensor | CountsUnderWay, int]:
        return self._counts.of_sequences(self.plan, self._num_sequences)
