"""How far a run has come, and what its rows of metrics count since the last one."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from dynmoe.config import Config
from dynmoe.errors import UserError
from dynmoe.model.size import ModelSize
from dynmoe.train.engine import Engine, Gradients, StepReport
from dynmoe.train.guard import GuardState
from dynmoe.train.metrics import Row, moe_row, peak_memory_gib, peak_tflops, throughput_row


@dataclass
class Progress:
    """How far a run has come; part of every checkpoint.

    ``wall_clock_s`` is what its steps, evaluations and checkpoints took, over all starts; what a kill lost and the
    time between starts are not in it. ``unlogged_bytes`` crossed between ranks since the last row of metrics, for
    ``unlogged_tokens``.
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    routed_rows: dict[str, int] = field(default_factory=dict)
    wandb_id: str | None = None
    wall_clock_s: float = 0.0
    unlogged_tokens: int = 0
    unlogged_bytes: int = 0
    guard: GuardState = field(default_factory=GuardState)

    @classmethod
    def of(cls, saved: dict[str, Any]) -> Progress:
        """The progress that a checkpoint has as a dictionary.

        Raises:
            UserError: it is none.
        """
        try:
            guard = GuardState(**saved["guard"])
            progress = cls(**{**saved, "guard": guard})
            counts = [
                progress.step, progress.samples, progress.tokens, progress.unlogged_tokens, progress.unlogged_bytes,
                guard.skipped_steps, guard.bad_in_a_row, guard.spikes_in_a_row, *progress.routed_rows.values(),
            ]  # fmt: skip
            sound = all(isinstance(count, int) and count >= 0 for count in counts)
            sound = sound and all(isinstance(number, float) for number in (progress.wall_clock_s, *guard.losses))
            sound = sound and isinstance(progress.wandb_id, str | None)
        except (KeyError, TypeError, AttributeError):
            sound = False
        if not sound:
            raise UserError("checkpoint: its progress is not that of a run; go on from another checkpoint")
        return progress


class Account:
    """Adds up what steps come to, for the run and for its next row of metrics.

    Args:
        config: of the run.
        engine: that takes the steps.
        size: of the model.
        progress: of the run; it is changed.
    """

    def __init__(self, config: Config, engine: Engine, size: ModelSize, progress: Progress) -> None:
        self._config, self._engine, self._size, self.progress = config, engine, size, progress
        self._peak = peak_tflops(config.logging.peak_tflops)
        self._clock = time.perf_counter()
        self.start_interval()

    def start_interval(self) -> None:
        """Throughput is taken from here on; evaluations and saves are not part of it."""
        self._start = time.perf_counter()
        self._tokens = 0
        self._rows: dict[int, int] = {}

    def add_step(self) -> None:
        config, progress = self._config, self.progress
        progress.step += 1
        progress.samples += config.train.global_batch
        progress.tokens += config.tokens_per_step
        progress.unlogged_tokens += config.tokens_per_step
        self._tokens += config.tokens_per_step

    def read_clock(self) -> float:
        """Adds the time since the last reading to the run's, which it returns."""
        now = time.perf_counter()
        self.progress.wall_clock_s += now - self._clock
        self._clock = now
        return self.progress.wall_clock_s

    def take_report(self) -> StepReport:
        """The engine's report; the rows computed since the last one are added to the run's. Collective."""
        report, progress = self._engine.report(), self.progress
        for layer, rows in report.routed_rows.items():
            progress.routed_rows[str(layer)] = progress.routed_rows.get(str(layer), 0) + rows
            self._rows[layer] = self._rows.get(layer, 0) + rows
        progress.unlogged_bytes += report.sent_bytes
        return report

    def row(self, report: StepReport, gradients: Gradients, lr: float) -> Row:
        """The row of the latest step, which ends the interval; without loss and routing where they are not finite."""
        seconds = time.perf_counter() - self._start
        config, progress, router = self._config, self.progress, self._config.model.router
        rows, total_rows = sum(self._rows.values()), sum(progress.routed_rows.values())
        row = {
            "train/step": progress.step,
            "train/learning_rate": lr,
            "train/tokens": progress.tokens,
            "train/skipped_steps": progress.guard.skipped_steps,
            "train/step_time_s": seconds / (self._tokens // config.tokens_per_step),
            "train/wall_clock_s": self.read_clock(),
            "train/cumulative_flops": self._size.flops(progress.tokens, total_rows),
            "memory/peak_gib": peak_memory_gib(),
            **throughput_row(
                self._size, self._tokens, rows, seconds, self._engine.world_size, self._peak, float(router.k)
            ),
        }
        if config.parallel.expert > 1:
            row["moe/all_to_all_bytes_per_token"] = progress.unlogged_bytes / progress.unlogged_tokens
        progress.unlogged_tokens = progress.unlogged_bytes = 0
        if not gradients.finite:
            return row
        moe = moe_row(report, config, progress.step)
        auxiliary = moe.get("moe/auxiliary_loss", 0.0) * len(config.model.moe_layers)
        losses = {
            "train/loss": gradients.lm_loss + auxiliary,
            "train/lm_loss": gradients.lm_loss,
            "train/grad_norm": gradients.grad_norm,
        }
        return row | losses | moe
