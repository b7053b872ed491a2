"""What all MoE layers of a model share: process groups, and the state of the step in progress."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch.distributed as dist

from dynmoe.moe.observation import Wanted


@dataclass
class MoEContext:
    """One per model, made by the engine and handed to every layer.

    Attributes:
        expert_group: ranks over which the experts are spread; None where each rank holds all of them.
        token_group: ranks whose tokens share auxiliary losses and statistics; None for this rank alone.
        loss_scale: what the engine multiplies the main loss with (1 / accumulation steps).
        micro_batch: number of the forward pass within the optimizer step.
        recording: statistics are collected in this step.
        observing: what is collected in this step for budget control and adaptation; None for nothing.
        calibrating: threshold routers set their thresholds from the scores of this pass.
        target_experts: experts per token wanted at present; the relu router's penalty is relative to it.
        recomputing: the pass in progress repeats an earlier one (activation checkpointing); nothing is counted.
    """

    expert_group: dist.ProcessGroup | None = None
    token_group: dist.ProcessGroup | None = None
    loss_scale: float = 1.0
    micro_batch: int = 0
    recording: bool = False
    observing: Wanted | None = None
    calibrating: bool = False
    target_experts: float = 1.0
    recomputing: bool = False

    @property
    def expert_parallel(self) -> int:
        return 1 if self.expert_group is None else dist.get_world_size(self.expert_group)

    @property
    def expert_rank(self) -> int:
        return 0 if self.expert_group is None else dist.get_rank(self.expert_group)

    @contextmanager
    def recompute(self) -> Iterator[None]:
        """Marks a pass that repeats an earlier one."""
        self.recomputing = True
        try:
            yield
        finally:
            self.recomputing = False
