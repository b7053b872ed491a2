"""What the trainer asks of an engine. Engines depend on this; the trainer on none of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from dynmoe.data.batches import Batch
from dynmoe.errors import UserError
from dynmoe.moe import MoEContext, MoELayer
from dynmoe.moe.adaptation import AdaptationEvent


@dataclass(frozen=True)
class Gradients:
    """What a step's forward and backward passes came to, the same on every rank.

    Attributes:
        lm_loss: cross-entropy in nats, mean over all tokens of the global batch.
        grad_norm: norm of the whole model's gradient before clipping.
    """

    lm_loss: float
    grad_norm: float

    @property
    def finite(self) -> bool:
        return math.isfinite(self.lm_loss) and math.isfinite(self.grad_norm)


@dataclass(frozen=True)
class StepReport:
    """Counts of the latest step, the same on every rank.

    Attributes:
        routed_rows: rows that each MoE layer (by index) computed over all ranks since the last report.
        sent_bytes: what expert parallelism sent between ranks since the last report, over all layers and ranks.
        statistics: vector of each MoE layer (see ``dynmoe.moe.statistics``), summed over all ranks; empty unless the
            step was recorded.
    """

    routed_rows: dict[int, int]
    sent_bytes: int
    statistics: dict[int, Tensor]


@dataclass(frozen=True)
class Snapshot:
    """A rank's state after one step, copied to host memory on its way into a checkpoint's directory.

    Attributes:
        write: puts this rank's files into place and returns them; local, once, on any thread: later steps change
            nothing of what it writes.
        finish: writes what is known only when every rank has written, and returns it; collective.
    """

    write: Callable[[], list[Path]]
    finish: Callable[[], list[Path]] = list


class Engine(Protocol):
    """A model, its optimizer and its process groups. Every method is collective unless it says otherwise.

    ``context`` is what all MoE layers of this rank share; ``data_rank`` of ``data_size`` says which sequences it reads;
    ``step`` is the number of the latest step, those included that were skipped; ``layers`` are the MoE layers of this
    rank, in their order; ``local_modules`` take part in every forward pass with the same shapes on every rank, and no
    collective lies in them.
    """

    context: MoEContext
    device: torch.device
    rank: int
    world_size: int
    data_rank: int
    data_size: int
    step: int
    layers: list[MoELayer]
    local_modules: Sequence[nn.Module]

    def compute_gradients(self, batches: Sequence[Batch], record: bool) -> Gradients:
        """The next step over the micro-batches of this rank; with ``record`` MoE statistics are collected.

        Then comes either :meth:`update` or :meth:`skip`.
        """

    def update(self, lr: float) -> list[AdaptationEvent]:
        """Takes the step: clips, and lets the optimizer and what acts between steps have it.

        Returns the experts that came and went after it, the same list on every rank.
        """

    def skip(self) -> list[AdaptationEvent]:
        """Forgets the step's gradients and what it saw: parameters, moments and budgets stay as they are.

        A window of adaptation goes on, or ends, without it.
        """

    def describe_nonfinite(self) -> str:
        """What of the step is not finite, and on which rank, in which layer and parameter first.

        Raises:
            UserError: only a ceiling of experts per token was passed.
        """

    def positions(self, length: int) -> Tensor:
        """Positions of a sequence of ``length`` tokens that this rank's layers compute, in their order; local."""

    def report(self) -> StepReport:
        """Reduces the figures of the latest step over all ranks, in one collective."""

    def evaluate(self, batches: Sequence[Batch], texts: Sequence[int], per_rank: Sequence[float]) -> list[float]:
        """Mean cross-entropy of each text over the batches of all ranks, in one reduction.

        Args:
            batches: of this rank; every rank gives as many, of the same shape.
            texts: which text each of them is of.
            per_rank: of each text, how many batches a data-parallel rank has of it in the mean.
        """

    def logits(self, tokens_BS: Tensor) -> Tensor:
        """Logits [B, S, V] in evaluation; ranks of different ``data_rank`` may give different tokens."""

    def snapshot(self, directory: Path) -> Snapshot:
        """Copies model, optimizer and random state, to be written into ``directory``, which exists."""

    def load(self, directory: Path) -> None:
        """Restores what a :class:`Snapshot` wrote, under any parallel layout."""


def take_step(
    engine: Engine, batches: Sequence[Batch], lr: float, record: bool = False
) -> tuple[Gradients, list[AdaptationEvent]]:
    """A whole step, whatever its loss is, and the experts that came and went after it.

    Raises:
        UserError: it is not finite; parameters and moments are as before.
    """
    gradients = engine.compute_gradients(batches, record)
    if not gradients.finite:
        raise UserError(f"step {engine.step}: {engine.describe_nonfinite()}")
    return gradients, engine.update(lr)
