"""The counts that auxiliary losses need, over the ranks and micro-batches of their scope."""

from __future__ import annotations

import functools

import torch.distributed as dist
from torch import Tensor

from dynmoe.moe.context import MoEContext
from dynmoe.moe.counts import PendingCounts
from dynmoe.routers.base import LossInputs, RouterSpec, RouterState
from dynmoe.routing import RoutingCounts, RoutingPlan, losses

Counts = RoutingCounts | PendingCounts


class LossCounts:
    """Counts of one layer in the current step, by micro-batch. A recomputed forward pass reuses those of the first."""

    def __init__(self, context: MoEContext) -> None:
        self._context = context
        self._batches: list[Counts] = []
        self._sequences: list[PendingCounts] = []

    def wait(self) -> None:
        """Waits for all pending counts, which fills in the losses that use them."""
        for counts in (*self._batches, *self._sequences):
            if isinstance(counts, PendingCounts):
                counts.get()

    def of_batch(self, plan: RoutingPlan, scope: str) -> Counts:
        """Counts of the scope; those of the global batch accumulate over its micro-batches."""
        local = RoutingCounts.of(plan)
        if scope != "global_batch":
            return local
        micro_batch = self._context.step.micro_batch
        if not self._context.step.recomputing:
            earlier = self._batches[:micro_batch]
            self._batches = [*earlier, self._accumulate(local, earlier[-1] if earlier else None)]
        return self._batches[micro_batch]

    def _accumulate(self, local: RoutingCounts, earlier: Counts | None) -> Counts:
        """Counts of a forward pass over all ranks, plus those of the earlier ones."""
        sums = self._context.token_counts
        if sums is None:
            assert not isinstance(earlier, PendingCounts)
            return local if earlier is None else earlier + local
        assert not isinstance(earlier, RoutingCounts)
        ranks = dist.get_world_size(self._context.groups.tokens)

        def read(packed: Tensor) -> RoutingCounts:
            counts = RoutingCounts.unpack(packed, ranks)
            return counts if earlier is None else earlier.get() + counts

        return sums.add(local.pack(), read)

    def of_sequences(self, plan: RoutingPlan, num_sequences: int) -> tuple[Tensor | PendingCounts, int]:
        """Counts of whole sequences, and the number of ranks over which each is split."""
        selected_BE = losses.sequence_counts(plan, num_sequences)
        sums = self._context.sequence_counts
        if sums is None:
            return selected_BE, 1
        micro_batch = self._context.step.micro_batch
        if not self._context.step.recomputing:
            pending = sums.add(selected_BE, lambda selected_BE: selected_BE)
            self._sequences = [*self._sequences[:micro_batch], pending]
        return self._sequences[micro_batch], dist.get_world_size(self._context.groups.sequence)


class CountedLossInputs(LossInputs):
    """Inputs of losses with the counts of the configured scope over all ranks.

    Args:
        num_sequences: number of sequences in the plan; tokens of a sequence are contiguous.
        counts: of the layer.
    """

    def __init__(
        self, spec: RouterSpec, state: RouterState, plan: RoutingPlan, num_sequences: int, counts: LossCounts
    ) -> None:
        super().__init__(spec, state, plan)
        self._num_sequences = num_sequences
        self._counts = counts

    @functools.cached_property
    def counts(self) -> Counts:
        return self._counts.of_batch(self.plan, self.spec.balance_scope)

    @functools.cached_property
    def sequence_counts(self) -> tuple[Tensor | PendingCounts, int]:
        return self._counts.of_sequences(self.plan, self._num_sequences)
