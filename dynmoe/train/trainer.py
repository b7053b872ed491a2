"""The order of a run: resume, steps, evaluation, checkpoints, end. What happens in each lies elsewhere."""

from __future__ import annotations

import dataclasses
import math
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from dynmoe.config import Config
from dynmoe.data.batches import Batch, PretrainingData
from dynmoe.errors import UserError
from dynmoe.model.size import ModelSize
from dynmoe.train.checkpoint import CheckpointStore
from dynmoe.train.console import ProgressLine
from dynmoe.train.engine import Engine, StepReport
from dynmoe.train.metrics import (
    MetricsLog,
    Row,
    View,
    auxiliary_loss,
    moe_row,
    peak_memory_gib,
    peak_tflops,
    throughput_row,
)
from dynmoe.train.run_directory import RunDirectory
from dynmoe.train.schedule import learning_rate

# A resumed run may differ from its checkpoint in everything but these.
_FIXED = ("model", "data", "train.seed")


@dataclass
class Progress:
    """How far a run has come; part of every checkpoint."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    routed_rows: dict[str, int] = field(default_factory=dict)
    wandb_id: str | None = None


@dataclass(frozen=True)
class Result:
    """How a start of a run ended: ``finished`` or ``preempted``."""

    status: str
    progress: Progress
    last_row: Row


class Trainer:
    """Runs the steps that are left of a run.

    Args:
        config: of the run.
        engine: model and optimizer.
        data: training and validation samples.
        directory: of the run; already created.
        vocab_size: rows of the model's embedding.
        make_views: makes the views of the metrics on the first rank, given the W&B id of an earlier start.
    """

    def __init__(
        self,
        config: Config,
        engine: Engine,
        data: PretrainingData,
        directory: RunDirectory,
        vocab_size: int,
        make_views: Callable[[str | None], tuple[list[View], str | None]],
    ) -> None:
        self.config, self.engine, self.data, self.directory = config, engine, data, directory
        self.size = ModelSize(config.model, vocab_size, config.data.sequence_length)
        self.checkpoints = CheckpointStore(directory.checkpoints, config.checkpoint.keep)
        self.progress = Progress()
        self._make_views = make_views
        self._peak = peak_tflops(config.logging.peak_tflops)
        self._terminated = False
        self._interval_start = time.perf_counter()
        self._interval_tokens = 0
        self._interval_rows: dict[int, int] = {}

    def run(self) -> Result:
        """Resumes where a checkpoint is, trains to the last step or until SIGTERM, and leaves a checkpoint."""
        train = self.config.train
        self._resume()
        log, line = self._open_log()
        previous = signal.signal(signal.SIGTERM, self._note_termination)
        row: Row = {}
        saved = self.progress.step
        self._interval_start = time.perf_counter()
        try:
            while self.progress.step < train.steps:
                row = self._step(log, line) or row
                self._stop_on_damage(row)
                ends = self._agree_to_end()
                if ends or self._due(self.config.checkpoint.interval) or self.progress.step == train.steps:
                    self._save()
                    saved = self.progress.step
                if ends and self.progress.step < train.steps:
                    return Result("preempted", self.progress, row)
            assert saved == self.progress.step
            return Result("finished", self.progress, row)
        finally:
            signal.signal(signal.SIGTERM, previous)
            if log is not None and line is not None:
                line.close()
                log.close()

    def _step(self, log: MetricsLog | None, line: ProgressLine | None) -> Row | None:
        """One optimizer step, and its row of metrics where one is due."""
        config, progress = self.config, self.progress
        step = progress.step + 1
        evaluates = step == config.train.steps or (config.eval.interval and step % config.eval.interval == 0)
        logs = bool(evaluates) or step % config.logging.interval == 0
        lr = learning_rate(step, config.train.steps, config.optimizer, config.schedule)
        self.engine.train_step(self._next_batches(), lr, record=logs)
        progress.step = step
        progress.samples += config.train.global_batch
        progress.tokens += config.tokens_per_step
        self._interval_tokens += config.tokens_per_step
        if not logs:
            return None
        report = self._account()
        seconds = time.perf_counter() - self._interval_start
        row = self._row(report, lr, seconds)
        if evaluates:
            loss = self.evaluate()
            row |= {"eval/loss": loss, "eval/perplexity": math.exp(min(loss, 700.0))}
        if log is not None and line is not None:
            log.log(row)
            line.show(row, seconds, step)
        self._interval_start, self._interval_tokens, self._interval_rows = time.perf_counter(), 0, {}
        return row

    def _account(self) -> StepReport:
        """Adds the rows computed since the last report to the run's total."""
        report = self.engine.report()
        for layer, rows in report.routed_rows.items():
            self.progress.routed_rows[str(layer)] = self.progress.routed_rows.get(str(layer), 0) + rows
            self._interval_rows[layer] = self._interval_rows.get(layer, 0) + rows
        return report

    def _row(self, report: StepReport, lr: float, seconds: float) -> Row:
        progress = self.progress
        moe = moe_row(report, self.config)
        steps = self._interval_tokens // self.config.tokens_per_step
        router = self.config.model.router
        rows, total_rows = sum(self._interval_rows.values()), sum(progress.routed_rows.values())
        return {
            "train/step": progress.step,
            "train/loss": report.lm_loss + auxiliary_loss(moe, self.config),
            "train/lm_loss": report.lm_loss,
            "train/grad_norm": report.grad_norm,
            "train/learning_rate": lr,
            "train/tokens": progress.tokens,
            "train/step_time_s": seconds / steps,
            "train/cumulative_flops": self.size.flops(progress.tokens, total_rows),
            "memory/peak_gib": peak_memory_gib(),
            **throughput_row(
                self.size, self._interval_tokens, rows, seconds, self.engine.world_size, self._peak, float(router.k)
            ),
            **moe,
        }

    def _next_batches(self) -> list[Batch]:
        """The micro-batches of this rank: consecutive samples go round the ranks, then to the next micro-batch."""
        train, engine, first = self.config.train, self.engine, self.progress.samples
        self.data.prepare(first, train.global_batch)
        per_pass = train.micro_batch * engine.data_size
        starts = range(first + engine.data_rank * train.micro_batch, first + train.global_batch, per_pass)
        return [self.data.train_batch(range(start, start + train.micro_batch)) for start in starts]

    def evaluate(self) -> float:
        """Mean loss over the first validation samples: as many as ``eval.batches`` asks for, or as there are."""
        train, engine = self.config.train, self.engine
        per_pass = train.micro_batch * engine.data_size
        count = min(self.config.eval.batches * train.global_batch, self.data.validation_samples) // per_pass * per_pass
        if count == 0:
            raise UserError(
                f"train.micro_batch={train.micro_batch}: the validation data has {self.data.validation_samples} "
                f"sequences, fewer than one pass over all ranks ({per_pass}); use a smaller one or more text"
            )
        starts = range(engine.data_rank * train.micro_batch, count, per_pass)
        return engine.evaluate([self.data.validation_batch(range(s, s + train.micro_batch)) for s in starts])

    def _due(self, interval: int) -> bool:
        return interval > 0 and self.progress.step % interval == 0

    def _save(self) -> None:
        self._account()
        state = {"progress": dataclasses.asdict(self.progress), "config": dataclasses.asdict(self.config)}
        self.checkpoints.save(self.progress.step, self.engine.save, state)
        self._interval_start, self._interval_tokens, self._interval_rows = time.perf_counter(), 0, {}

    def _resume(self) -> None:
        self.checkpoints.remove_leftovers()
        checkpoint = self.checkpoints.newest()
        if checkpoint is None:
            return
        state = checkpoint.trainer_state
        _refuse_changes(state["config"], dataclasses.asdict(self.config))
        self.engine.load(checkpoint.path)
        self.progress = Progress(**state["progress"])

    def _open_log(self) -> tuple[MetricsLog | None, ProgressLine | None]:
        """Metrics and progress of the first rank; the W&B id goes to all, as all keep it in their progress."""
        log, line = None, None
        if self.engine.rank == 0:
            self.directory.clear_outcome()
            views, self.progress.wandb_id = self._make_views(self.progress.wandb_id)
            log = MetricsLog(self.directory.metrics, self.progress.step, views)
            line = ProgressLine(self.config.train.steps, self.progress.step)
        return log, line

    def _note_termination(self, number: int, frame: Any) -> None:
        self._terminated = True

    def _agree_to_end(self) -> bool:
        """Whether any rank was told to end: signals reach ranks in different steps."""
        flag = torch.tensor([float(self._terminated)])
        if torch.cuda.is_available():
            flag = flag.cuda()
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

    def _stop_on_damage(self, row: Row) -> None:
        """Ends the run where loss or gradient norm of a logged step is not finite; every rank sees the same row."""
        for name in ("train/lm_loss", "train/grad_norm"):
            if not math.isfinite(row.get(name, 0.0)):
                step = int(row["train/step"])
                raise UserError(f"{name} is {row[name]} at step {step}; resume with a lower optimizer.lr")


def _refuse_changes(saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Raises a UserError that shows what differs in a field that a resumed run must keep."""
    old, new = dict(_flatten(saved)), dict(_flatten(current))
    for name in sorted(old.keys() | new.keys()):
        fixed = any(name == section or name.startswith(f"{section}.") for section in _FIXED)
        if fixed and old.get(name) != new.get(name):
            cure = "keep it, or start anew with another run.name"
            raise UserError(f"{name}={new.get(name)!r}: the run's checkpoint has {old.get(name)!r}; {cure}")


def _flatten(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for key, value in tree.items():
        name = f"{prefix}{key}"
        flat += _flatten(value, f"{name}.") if isinstance(value, dict) else [(name, value)]
    return flat
