"""What the trainer asks of an engine. Engines depend on this; the trainer on none of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from dynmoe.data.batches import Batch
from dynmoe.moe import MoEContext
from dynmoe.moe.adaptation import AdaptationEvent


@dataclass(frozen=True)
class StepReport:
    """Figures of the latest step, the same on every rank.

    Attributes:
        lm_loss: cross-entropy in nats, mean over all tokens of the global batch.
        grad_norm: norm of the whole model's gradient before clipping.
        routed_rows: rows that each MoE layer (by index) computed over all ranks since the last report.
        sent_bytes: what expert parallelism sent between ranks since the last report, over all layers and ranks.
        statistics: vector of each MoE layer (see ``dynmoe.moe.statistics``), summed over all ranks; empty unless the
            step was recorded.
    """

    lm_loss: float
    grad_norm: float
    routed_rows: dict[int, int]
    sent_bytes: int
    statistics: dict[int, Tensor]


class Engine(Protocol):
    """A model, its optimizer and its process groups. Every method is collective unless it says otherwise.

    ``context`` is what all MoE layers of this rank share; ``data_rank`` of ``data_size`` says which sequences it reads.
    """

    context: MoEContext
    device: torch.device
    rank: int
    world_size: int
    data_rank: int
    data_size: int

    def train_step(self, batches: Sequence[Batch], lr: float, record: bool) -> list[AdaptationEvent]:
        """One optimizer step over the micro-batches of this rank; with ``record`` MoE statistics are collected.

        Returns the experts that came and went after it, the same list on every rank.
        """

    def positions(self, length: int) -> Tensor:
        """Positions of a sequence of ``length`` tokens that this rank's layers compute, in their order; local."""

    def report(self) -> StepReport:
        """Reduces the figures of the latest step over all ranks, in one collective."""

    def evaluate(self, batches: Sequence[Batch]) -> float:
        """Mean cross-entropy over the batches of all ranks; every rank gives as many sequences."""

    def logits(self, tokens_BS: Tensor) -> Tensor:
        """Logits [B, S, V] in evaluation; every rank gives the same tokens."""

    def save(self, directory: Path) -> list[Path]:
        """Writes model, optimizer and random state; returns the files that this rank wrote."""

    def load(self, directory: Path) -> None:
        """Restores what :meth:`save` wrote, under any parallel layout."""
