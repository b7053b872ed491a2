"""What all MoE layers of a model share: process groups, and the state of the step in progress."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch.distributed as dist

from dynmoe.moe.counts import CountsOverRanks
from dynmoe.moe.observation import Wanted
from dynmoe.moe.trace import RoutingTrace


@dataclass
class MoEContext:
    """One per model, made by the engine and handed to every layer.

    Attributes:
        expert_group: ranks over which the experts are spread; None where each rank holds all of them.
        token_group: ranks whose tokens share auxiliary losses and statistics; None for this rank alone.
        sequence_group: ranks over which each sequence is spread (tensor and context parallelism); None for none.
        pipeline_group: ranks that hold the other layers of the model; None where this rank holds all of them.
        loss_scale: what the engine multiplies the main loss with (1 / accumulation steps), over the ranks whose
            gradients it adds up instead of averaging them.
        micro_batch: number of the forward pass within the optimizer step.
        recording: statistics are collected in this step.
        trace: collects the routing of this step; None where it is not traced.
        observing: what is collected in this step for budget control and adaptation; None for nothing.
        calibrating: threshold routers set their thresholds from the scores of this pass.
        target_experts: experts per token wanted at present; the relu router's penalty is relative to it.
        backend: that computes the experts (see ``dynmoe.ops.routed_experts``).
        recomputing: the pass in progress repeats an earlier one (activation checkpointing); nothing is counted.
        token_counts, sequence_counts: what is added up over the groups of those names; None without them.
    """

    expert_group: dist.ProcessGroup | None = None
    token_group: dist.ProcessGroup | None = None
    sequence_group: dist.ProcessGroup | None = None
    pipeline_group: dist.ProcessGroup | None = None
    loss_scale: float = 1.0
    micro_batch: int = 0
    recording: bool = False
    trace: RoutingTrace | None = None
    observing: Wanted | None = None
    calibrating: bool = False
    target_experts: float = 1.0
    backend: str = "auto"
    recomputing: bool = False
    token_counts: CountsOverRanks | None = field(init=False)
    sequence_counts: CountsOverRanks | None = field(init=False)

    def __post_init__(self) -> None:
        self.token_counts = None if self.token_group is None else CountsOverRanks(self.token_group)
        self.sequence_counts = None if self.sequence_group is None else CountsOverRanks(self.sequence_group)

    def start_counts(self) -> None:
        """Sends off the counts of a pass whose routers have all made their plans.

        Whoever does not call it has them sent off, and waited for, when the backward pass first needs them.
        """
        for counts in (self.token_counts, self.sequence_counts):
            if counts is not None:
                counts.start()

    @property
    def expert_parallel(self) -> int:
        return 1 if self.expert_group is None else dist.get_world_size(self.expert_group)

    @property
    def expert_rank(self) -> int:
        return 0 if self.expert_group is None else dist.get_rank(self.expert_group)

    @contextmanager
    def recompute(self, micro_batch: int) -> Iterator[None]:
        """Marks a pass that repeats the earlier one of ``micro_batch``."""
        previous = self.micro_batch, self.recomputing
        self.micro_batch, self.recomputing = micro_batch, True
        try:
            yield
        finally:
            self.micro_batch, self.recomputing = previous

    def checkpoint_contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Of a pass and of its repetition, for ``torch.utils.checkpoint``.

        Other passes may lie between the two: a pipeline runs several forward passes ahead.
        """
        return nullcontext(), self.recompute(self.micro_batch)
