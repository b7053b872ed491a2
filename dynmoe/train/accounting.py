"""Progress of a run, and the totals behind its metrics."""

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

# Experts per token of a report that knows no dynamic number.
_STATIC_K = 2.0


@dataclass
class Progress:
    """Progress of a run; part of every checkpoint.

    ``wall_clock_s`` is the time spent in steps, evaluations and checkpoints over all starts, without steps lost by a
    kill and without the time between starts. ``unlogged_bytes`` is the traffic between ranks since the last row of
    metrics, during ``unlogged_tokens`` tokens.
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
        """The progress that a checkpoint stores as a dictionary.

        Raises:
            UserError: the dictionary is not a progress.
        """
        try:
            guard = GuardState(**saved["guard"])
            progress = cls(**{**saved, "guard": guard})
            counts = [
                progress.step, progress.samples, progress.tokens, progress.unlogged_tokens, progress.unlogged_bytes,
                guard.skipped_steps, guard.bad_in_a_row, guard.spikes_in_a_row, *progress.routed_rows.values(),
            ]  # fmt: skip
            valid = all(isinstance(count, int) and count >= 0 for count in counts)
            valid = valid and all(isinstance(number, float) for number in (progress.wall_clock_s, *guard.losses))
            valid = valid and isinstance(progress.wandb_id, str | None)
        except (KeyError, TypeError, AttributeError):
            valid = False
        if not valid:
            raise UserError("checkpoint: its progress is invalid; resume from another checkpoint")
        return progress


class Account:
    """Accumulates the totals of the run and of its next row of metrics.

    Args:
        config: configuration of the run.
        engine: the engine that runs the steps.
        size: size of the model.
        progress: progress of the run; it is modified.
    """

    def __init__(self, config: Config, engine: Engine, size: ModelSize, progress: Progress) -> None:
        self._config = config
        self._engine = engine
        self._size = size
        self.progress = progress
        self._peak = peak_tflops(config.logging.peak_tflops)
        self._clock = time.perf_counter()
        self.start_interval()

    def start_interval(self) -> None:
        """Starts the interval for throughput, which excludes evaluations and saves."""
        self._start = time.perf_counter()
        self._tokens = 0
        self._rows: dict[int, int] = {}

    def add_step(self) -> None:
        tokens = self._config.tokens_per_step
        self.progress.step += 1
        self.progress.samples += self._config.train.global_batch
        self.progress.tokens += tokens
        self.progress.unlogged_tokens += tokens
        self._tokens += tokens

    def read_clock(self) -> float:
        """Adds the time since the last call to the wall-clock time of the run, and returns that."""
        now = time.perf_counter()
        self.progress.wall_clock_s += now - self._clock
        self._clock = now
        return self.progress.wall_clock_s

    def take_report(self) -> StepReport:
        """The engine's report, whose routed rows are added to those of the run. Collective."""
        report = self._engine.report()
        progress = self.progress
        for layer, rows in report.routed_rows.items():
            progress.routed_rows[str(layer)] = progress.routed_rows.get(str(layer), 0) + rows
            self._rows[layer] = self._rows.get(layer, 0) + rows
        progress.unlogged_bytes += report.sent_bytes
        return report

    def row(self, report: StepReport, gradients: Gradients, lr: float) -> Row:
        """The row of metrics of the latest step, which ends the interval; without loss and routing if not finite."""
        seconds = time.perf_counter() - self._start
        config = self._config
        progress = self.progress
        rows = sum(self._rows.values())
        total_rows = sum(progress.routed_rows.values())
        static_k = config.model.router.expected_experts or _STATIC_K
        row = {
            "train/step": progress.step,
            "train/learning_rate": lr,
            "train/tokens": progress.tokens,
            "train/skipped_steps": progress.guard.skipped_steps,
            "train/step_time_s": seconds / (self._tokens // config.tokens_per_step),
            "train/wall_clock_s": self.read_clock(),
            "train/cumulative_flops": self._size.flops(progress.tokens, total_rows),
            "memory/peak_gib": peak_memory_gib(),
            **throughput_row(self._size, self._tokens, rows, seconds, self._engine.world_size, self._peak, static_k),
        }
        if config.parallel.expert > 1:
            row["moe/all_to_all_bytes_per_token"] = progress.unlogged_bytes / progress.unlogged_tokens
        progress.unlogged_tokens = progress.unlogged_bytes = 0
        if not gradients.finite:
            return row
        moe = moe_row(report, config, progress.step)
        auxiliary = moe.get("moe/auxiliary_loss", 0.0) * len(config.model.moe_layers)
        mtp = config.model.mtp
        losses = {
            "train/loss": gradients.lm_loss + auxiliary + mtp.loss_weight * gradients.mtp_loss,
            "train/lm_loss": gradients.lm_loss,
            **({"train/mtp_loss": gradients.mtp_loss} if mtp.layers else {}),
            "train/grad_norm": gradients.grad_norm,
        }
        return row | losses | moe
