"""The protocol between trainer and engines. Engines depend on it; the trainer depends on no engine."""

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
from dynmoe.moe.replay import RoutingReplay
from dynmoe.moe.trace import RoutingTrace


@dataclass(frozen=True)
class Gradients:
    """Result of the forward and backward passes of a step, the same on every rank.

    Attributes:
        lm_loss: cross-entropy in nats, mean over all predicted tokens of the global batch.
        grad_norm: norm of the gradient of the whole model before clipping.
        mtp_loss: the same as ``lm_loss`` for the further tokens, averaged over the layers that predict them; 0 if none
            does.
    """

    lm_loss: float
    grad_norm: float
    mtp_loss: float = 0.0

    @property
    def finite(self) -> bool:
        return math.isfinite(self.lm_loss) and math.isfinite(self.grad_norm)


@dataclass(frozen=True)
class StepReport:
    """Counts of the latest step, the same on every rank.

    Attributes:
        routed_rows: rows computed by each MoE layer (by index) on all ranks since the last report.
        sent_bytes: bytes sent between ranks by expert parallelism since the last report, over all layers and ranks.
        statistics: vector of each MoE layer (see ``dynmoe.moe.statistics``), summed over all ranks; empty unless the
            step was recorded.
    """

    routed_rows: dict[int, int]
    sent_bytes: int
    statistics: dict[int, Tensor]


@dataclass(frozen=True)
class Snapshot:
    """A copy in host memory of a rank's state after a step, to be written into a checkpoint directory.

    Attributes:
        write: writes this rank's files and returns their paths; local, called once, on any thread. Later steps do not
            affect what it writes.
        finish: writes the files that depend on the files of all ranks, and returns their paths; collective.
    """

    write: Callable[[], list[Path]]
    finish: Callable[[], list[Path]] = list


class Engine(Protocol):
    """A model, its optimizer and its process groups. Every method is collective unless documented as local.

    Attributes:
        context: state shared by all MoE layers of this rank.
        data_rank, data_size: data-parallel rank and size, which determine the sequences that this rank reads.
        step: number of the latest step, including skipped steps.
        layers: the MoE layers of this rank, in order.
        local_modules: modules without collectives that run in every forward pass, with the same shapes on every rank.
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

    def compute_gradients(
        self, batches: Sequence[Batch], record: bool, trace: RoutingTrace | None = None,
        replay: RoutingReplay | None = None,
    ) -> Gradients:  # fmt: skip
        """Runs the next step over the micro-batches of this rank; with ``record``, MoE statistics are collected.

        ``trace`` collects the routes of this rank, ``replay`` forces them. Must be followed by either :meth:`update` or
        :meth:`skip`.
        """

    def update(self, lr: float) -> list[AdaptationEvent]:
        """Clips the gradients, updates the model, and runs budget and adaptation.

        Returns the experts that were added or removed, the same list on every rank.
        """

    def skip(self) -> list[AdaptationEvent]:
        """Discards the step's gradients and statistics: parameters, moments and budgets do not change.

        An adaptation window continues, or ends, without this step.
        """

    def describe_nonfinite(self) -> str:
        """Describes what in the step is not finite, with rank, layer and parameter of the first occurrence.

        Raises:
            UserError: the only problem is that the limit of mean experts per token was exceeded.
        """

    def positions(self, length: int) -> Tensor:
        """Positions in a sequence of ``length`` tokens that this rank computes, in its order; local."""

    def report(self) -> StepReport:
        """Reduces the counts of the latest step over all ranks in one collective."""

    def evaluate(self, batches: Sequence[Batch], texts: Sequence[int], num_texts: int) -> list[float]:
        """Mean cross-entropy of each text over the tokens of all ranks, in one reduction.

        Args:
            batches: batches of this rank; number and shapes must be the same on every rank.
            texts: index of the text of each batch.
            num_texts: number of texts, of which a rank may have no batch.
        """

    def logits(self, tokens_BS: Tensor) -> Tensor:
        """Logits [B, S, V] in evaluation mode; ranks with different ``data_rank`` may pass different tokens."""

    def snapshot(self, directory: Path) -> Snapshot:
        """Copies model, optimizer and random state, to be written into the existing ``directory``."""

    def load(self, directory: Path) -> None:
        """Restores the state that a :class:`Snapshot` wrote, under any parallel layout."""


def take_step(
    engine: Engine, batches: Sequence[Batch], lr: float, record: bool = False, trace: RoutingTrace | None = None,
    replay: RoutingReplay | None = None,
) -> tuple[Gradients, list[AdaptationEvent]]:  # fmt: skip
    """Runs a step and its update without a guard; returns the experts added or removed as well.

    Raises:
        UserError: the step is not finite; parameters and moments have not changed.
    """
    gradients = engine.compute_gradients(batches, record, trace, replay)
    if not gradients.finite:
        raise UserError(f"step {engine.step}: {engine.describe_nonfinite()}")
    return gradients, engine.update(lr)
