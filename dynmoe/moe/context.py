"""What all MoE layers of a model share: process groups, and the state of the forward pass in progress."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from dynmoe.moe.counts import CountsOverRanks
from dynmoe.moe.trace import RoutingTrace
from dynmoe.routing.control_statistics import ControlStatisticsSpec


@dataclass(frozen=True)
class MoEGroups:
    """The process groups of the MoE layers.

    Attributes:
        expert: ranks over which the experts are spread; None where each rank holds all of them.
        tokens: ranks whose tokens share auxiliary losses and statistics; None for this rank alone.
        sequence: ranks over which each sequence is spread (tensor and context parallelism); None for none.
        pipeline: ranks that hold the other layers of the model; None where this rank holds all of them.
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
    """What a forward pass is told of the optimizer step that it belongs to.

    Attributes:
        loss_scale: what the engine multiplies the main loss with (1 / accumulation steps), over the ranks whose
            gradients it adds up instead of averaging them.
        micro_batch: number of the forward pass within the step.
        recomputing: this pass repeats an earlier one (activation checkpointing); nothing is counted.
        calibrating: threshold routers set their thresholds from the scores of this pass.
        recording: statistics are collected.
        control: the control statistics that are collected for budgets and adaptation; None for none.
        target_experts: experts per token that the budget asks for; the penalty of the relu router is relative to it.
        trace: collects the routes; None where the step is not traced.
    """

    loss_scale: float = 1.0
    micro_batch: int = 0
    recomputing: bool = False
    calibrating: bool = False
    recording: bool = False
    control: ControlStatisticsSpec | None = None
    target_experts: float = 1.0
    trace: RoutingTrace | None = None


class MoEContext:
    """One per model, made by the engine and given to every layer.

    Attributes:
        groups: process groups.
        backend: what computes the experts (see ``dynmoe.ops.routed_experts``).
        step: state of the forward pass in progress; :meth:`running` alone changes it.
        token_counts, sequence_counts: what is summed over the groups of those names; None without them.
    """

    def __init__(self, groups: MoEGroups | None = None, backend: str = "auto", step: StepState | None = None) -> None:
        self.groups = MoEGroups() if groups is None else groups
        self.backend = backend
        self.step = StepState() if step is None else step
        self.token_counts = None if self.groups.tokens is None else CountsOverRanks(self.groups.tokens)
        self.sequence_counts = None if self.groups.sequence is None else CountsOverRanks(self.groups.sequence)

    @contextmanager
    def running(self, **changes: Any) -> Iterator[None]:
        """Within it :attr:`step` has these fields changed."""
        before = self.step
        self.step = dataclasses.replace(before, **changes)
        try:
            yield
        finally:
            self.step = before

    def start_counts(self) -> None:
        """Starts the all-reduce of the counts of a pass whose routers have all made their plans.

        Without this call it starts when the backward pass first needs a count, and is waited for there.
        """
        for counts in (self.token_counts, self.sequence_counts):
            if counts is not None:
                counts.start()

    def checkpoint_contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Of a pass and of its repetition, for ``torch.utils.checkpoint``.

        Other passes may lie between the two: a pipeline runs several forward passes ahead.
        """
        return nullcontext(), self.running(micro_batch=self.step.micro_batch, recomputing=True)
