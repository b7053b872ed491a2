"""State that all MoE layers of a model share: process groups, and the state of the current forward pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from dynmoe.moe.counts import CountsOverRanks
from dynmoe.moe.replay import RoutingReplay
from dynmoe.moe.trace import RoutingTrace
from dynmoe.routing.update_statistics import UpdateStatisticsSpec


@dataclass(frozen=True)
class MoEGroups:
    """The process groups of the MoE layers.

    Attributes:
        expert: ranks over which the experts are spread; None if each rank holds all of them.
        tokens: ranks whose tokens share auxiliary losses and statistics; None for this rank alone.
        sequence: ranks over which each sequence is split (tensor and context parallelism); None if it is not.
        pipeline: ranks that hold the other layers of the model; None if this rank holds all of them.
    """

    expert: dist.ProcessGroup | None = None
    tokens: dist.ProcessGroup | None = None
    sequence: dist.ProcessGroup | None = None
    pipeline: dist.ProcessGroup | None = None

    @property
    def expert_parallel(self) -> int:
        return 1 if self.expert is None else dist.get_world_size(self.expert)

    @property
    def expert_rank(self) -> int:
        return 0 if self.expert is None else dist.get_rank(self.expert)


@dataclass(frozen=True)
class StepState:
    """Settings of a forward pass that depend on its optimizer step.

    Attributes:
        loss_scale: factor by which the engine multiplies the main loss (1 / accumulation steps), divided by the number
            of ranks whose gradients it sums instead of averaging them.
        micro_batch: index of the forward pass within the step.
        recomputing: the forward pass repeats an earlier one (activation checkpointing), and nothing is counted.
        calibrating: threshold routers set their thresholds from the scores of this forward pass.
        recording: collect statistics for the metrics.
        update_statistics: statistics to collect for budgets and adaptation; None for none.
        target_experts: experts per token that the budget targets; None without a budget.
        trace: collects the routes; None if the step is not traced.
        replay: routes of another run that replace the routers' own; None if the step is not replayed.
    """

    loss_scale: float = 1.0
    micro_batch: int = 0
    recomputing: bool = False
    calibrating: bool = False
    recording: bool = False
    update_statistics: UpdateStatisticsSpec | None = None
    target_experts: float | None = None
    trace: RoutingTrace | None = None
    replay: RoutingReplay | None = None


class MoEContext:
    """One per model, created by the engine and passed to every layer.

    Attributes:
        groups: process groups.
        backend: computes the experts (see ``dynmoe.ops.routed_experts``).
        step: state of the current forward pass; only :meth:`override` and :meth:`aim` change it.
        token_counts, sequence_counts: all-reduces over the groups of these names; None without the group.
    """

    def __init__(self, groups: MoEGroups | None = None, backend: str = "auto", step: StepState | None = None) -> None:
        self.groups = MoEGroups() if groups is None else groups
        self.backend = backend
        self.step = StepState() if step is None else step
        self.token_counts = None if self.groups.tokens is None else CountsOverRanks(self.groups.tokens)
        self.sequence_counts = None if self.groups.sequence is None else CountsOverRanks(self.groups.sequence)

    def aim(self, target_experts: float | None) -> None:
        """Sets the experts per token outside of optimizer steps, in evaluation and generation."""
        self.step = dataclasses.replace(self.step, target_experts=target_experts)

    @contextmanager
    def override(self, **changes: Any) -> Iterator[None]:
        """Replaces fields of :attr:`step` within the context."""
        before = self.step
        self.step = dataclasses.replace(before, **changes)
        try:
            yield
        finally:
            self.step = before

    def start_counts(self) -> None:
        """Starts the all-reduce of the counts of a forward pass after the last router made its plan.

        Without this call, the backward pass starts it when it first needs a count, and waits for it there.
        """
        for counts in (self.token_counts, self.sequence_counts):
            if counts is not None:
                counts.start()

    def checkpoint_contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """The contexts of a forward pass and of its recomputation, for ``torch.utils.checkpoint``.

        A pipeline may run other forward passes between the two, so the micro-batch is fixed here.
        """
        return nullcontext(), self.override(micro_batch=self.step.micro_batch, recomputing=True)
