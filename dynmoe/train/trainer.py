"""The order of a run: resume, steps, evaluation, checkpoints, end. What happens in each lies elsewhere."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from dynmoe.config import Config
from dynmoe.data.batches import PretrainingData
from dynmoe.errors import ConfigError, UserError
from dynmoe.launched import Ending
from dynmoe.model.size import ModelSize
from dynmoe.moe.adaptation import AdaptationEvent
from dynmoe.moe.trace import RoutingTrace
from dynmoe.train.checkpoint import CheckpointStore
from dynmoe.train.engine import Engine, StepReport
from dynmoe.train.metrics import (
    Row,
    View,
    histograms,
    moe_row,
    peak_memory_gib,
    peak_tflops,
    throughput_row,
)
from dynmoe.train.record import RunRecord
from dynmoe.train.resume import refuse_changes
from dynmoe.train.run_directory import RunDirectory
from dynmoe.train.schedule import learning_rate
from dynmoe.train.traces import write_trace


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
        directory: of the run; claimed by the first rank.
        vocab_size: rows of the model's embedding.
        make_views: makes the views of the metrics on the first rank, given the W&B id of an earlier start and the step
            that this one goes on from.
        ending: tells whether this process was told to end.
    """

    def __init__(
        self,
        config: Config,
        engine: Engine,
        data: PretrainingData,
        directory: RunDirectory,
        vocab_size: int,
        make_views: Callable[[str | None, int], tuple[list[View], str | None]],
        ending: Ending,
    ) -> None:
        self.config, self.engine, self.data, self.directory = config, engine, data, directory
        self.size = ModelSize(config.model, vocab_size, config.data.sequence_length)
        self.checkpoints = CheckpointStore(directory.checkpoints, config.checkpoint.keep)
        self.progress = Progress()
        self._make_views = make_views
        self._peak = peak_tflops(config.logging.peak_tflops)
        self._ending = ending
        self._clock = time.perf_counter()
        self._start_interval()

    def run(self) -> Result:
        """Resumes where a checkpoint is, trains to the last step or until told to end, and leaves a checkpoint."""
        train = self.config.train
        self._resume()
        self._check_validation()
        record = self._begin()
        row: Row = {} if record is None else record.last_row
        self._clock = time.perf_counter()
        self._start_interval()
        try:
            while self.progress.step < train.steps:
                row = self._step(record) or row
                ends = self._agree_to_end()
                if ends or self._due(self.config.checkpoint.interval) or self.progress.step == train.steps:
                    self._save()
                if ends and self.progress.step < train.steps:
                    if record is not None:
                        self.directory.write_outcome("preempted", self.progress.step)
                    dist.barrier()  # before any launcher looks for the outcome
                    return Result("preempted", self.progress, row)
            return Result("finished", self.progress, row)
        except Exception as error:
            self.directory.write_outcome("failed", self.progress.step, error=f"{type(error).__name__}: {error}")
            raise
        finally:
            if record is not None:
                record.close()

    def _step(self, record: RunRecord | None) -> Row | None:
        """One optimizer step, and its row of metrics where one is due."""
        config, progress = self.config, self.progress
        step = progress.step + 1
        evaluates = step == config.train.steps or (config.eval.interval and step % config.eval.interval == 0)
        logs = bool(evaluates) or step % config.logging.interval == 0
        lr = learning_rate(step, config.train.steps, config.optimizer, config.schedule)
        events = self._train_step(step, lr, record=logs)
        if record is not None:
            record.add_events(events)
        progress.step = step
        progress.samples += config.train.global_batch
        progress.tokens += config.tokens_per_step
        progress.unlogged_tokens += config.tokens_per_step
        self._interval_tokens += config.tokens_per_step
        if not logs:
            return None
        report = self._account()
        seconds = time.perf_counter() - self._interval_start
        row = self._row(report, lr, seconds)
        progress.unlogged_tokens = progress.unlogged_bytes = 0
        if evaluates:
            loss = self.evaluate()
            row |= {"eval/loss": loss, "eval/perplexity": math.exp(min(loss, 700.0))}
        if record is not None:
            draws = config.logging.draws_histograms(step) or step == config.train.steps
            record.add_row(row, histograms(report, config, step) if draws else None)
        self._start_interval()
        return row

    def _train_step(self, step: int, lr: float, record: bool) -> list[AdaptationEvent]:
        """The step itself, and its trace where one is due."""
        samples = self._next_samples()
        batches = [self.data.train_batch(numbers) for numbers in samples]
        if not self.config.logging.traces(step):
            return self.engine.train_step(batches, lr, record)
        trace = self.engine.context.trace = RoutingTrace()
        events = self.engine.train_step(batches, lr, record)
        self.engine.context.trace = None
        positions_P = self.engine.positions(self.config.data.sequence_length)
        write_trace(self.directory.traces, step, self.engine.rank, trace, samples, batches, positions_P)
        return events

    def _start_interval(self) -> None:
        """Throughput is taken from here on; evaluations and saves are not part of it."""
        self._interval_start = time.perf_counter()
        self._interval_tokens = 0
        self._interval_rows: dict[int, int] = {}

    def _read_clock(self) -> float:
        """Adds the time since the last reading to the run's, which it returns."""
        now = time.perf_counter()
        self.progress.wall_clock_s += now - self._clock
        self._clock = now
        return self.progress.wall_clock_s

    def _account(self) -> StepReport:
        """Adds the rows computed since the last report to the run's total."""
        report = self.engine.report()
        for layer, rows in report.routed_rows.items():
            self.progress.routed_rows[str(layer)] = self.progress.routed_rows.get(str(layer), 0) + rows
            self._interval_rows[layer] = self._interval_rows.get(layer, 0) + rows
        self.progress.unlogged_bytes += report.sent_bytes
        return report

    def _row(self, report: StepReport, lr: float, seconds: float) -> Row:
        progress = self.progress
        moe = moe_row(report, self.config, progress.step)
        steps = self._interval_tokens // self.config.tokens_per_step
        router = self.config.model.router
        spread = self.config.parallel.expert > 1
        rows, total_rows = sum(self._interval_rows.values()), sum(progress.routed_rows.values())
        return {
            "train/step": progress.step,
            "train/loss": report.lm_loss + moe.get("moe/auxiliary_loss", 0.0) * len(self.config.model.moe_layers),
            "train/lm_loss": report.lm_loss,
            "train/grad_norm": report.grad_norm,
            "train/learning_rate": lr,
            "train/tokens": progress.tokens,
            "train/step_time_s": seconds / steps,
            "train/wall_clock_s": self._read_clock(),
            "train/cumulative_flops": self.size.flops(progress.tokens, total_rows),
            "memory/peak_gib": peak_memory_gib(),
            **throughput_row(
                self.size, self._interval_tokens, rows, seconds, self.engine.world_size, self._peak, float(router.k)
            ),
            **moe,
            **(
                {"moe/all_to_all_bytes_per_token": progress.unlogged_bytes / progress.unlogged_tokens} if spread else {}
            ),
        }

    def _next_samples(self) -> list[range]:
        """Of each micro-batch of this rank its samples: consecutive ones go round the ranks, then to the next pass."""
        train, engine, first = self.config.train, self.engine, self.progress.samples
        self.data.prepare(first, train.global_batch)
        starts = range(first + engine.data_rank * train.micro_batch, first + train.global_batch, self._per_pass)
        return [range(start, start + train.micro_batch) for start in starts]

    def evaluate(self) -> float:
        """Mean loss over the first validation samples: as many as ``eval.batches`` asks for, or as there are.

        A remainder that does not fill a forward pass on every rank is left out.
        """
        train, engine = self.config.train, self.engine
        wanted = min(self.config.eval.batches * train.global_batch, self.data.validation_samples)
        starts = range(engine.data_rank * train.micro_batch, wanted // self._per_pass * self._per_pass, self._per_pass)
        return engine.evaluate([self.data.validation_batch(range(s, s + train.micro_batch)) for s in starts])

    @property
    def _per_pass(self) -> int:
        """Sequences of one forward pass over all ranks."""
        return self.config.train.micro_batch * self.engine.data_size

    def _check_validation(self) -> None:
        """Refuses validation data that does not fill one forward pass: now, not at the first evaluation."""
        if self.data.validation_samples < self._per_pass:
            problem = (
                f"the validation data has {self.data.validation_samples} sequences, "
                f"fewer than one pass over all ranks ({self._per_pass})"
            )
            cure = "use a smaller one or more text"
            raise ConfigError("train.micro_batch", self.config.train.micro_batch, problem, cure)

    def _due(self, interval: int) -> bool:
        return interval > 0 and self.progress.step % interval == 0

    def _save(self) -> None:
        self._account()
        self._read_clock()
        data, config = [corpus.fingerprint for corpus in self.data.corpora], dataclasses.asdict(self.config)
        state = {"progress": dataclasses.asdict(self.progress), "config": config, "data": data}
        facts = {
            "ranks": self.engine.world_size,
            "parallel": config["parallel"],
            "config": self.config.digest(),
            "data": data,
        }
        self.checkpoints.save(self.progress.step, self.engine.save, state, facts)
        self._start_interval()

    def _resume(self) -> None:
        self.checkpoints.remove_leftovers()
        checkpoint = self.checkpoints.newest()
        if checkpoint is None:
            return
        state = checkpoint.trainer_state
        refuse_changes(state["config"], dataclasses.asdict(self.config))
        if state["data"] != [corpus.fingerprint for corpus in self.data.corpora]:
            raise UserError("data.dirs: not the text that this run was trained on; restore it or use another run.name")
        self.engine.load(checkpoint.path)
        self.progress = Progress(**state["progress"])

    def _begin(self) -> RunRecord | None:
        """Opens the record on the first rank, which alone keeps the W&B id: it writes the trainer's state."""
        if self.engine.rank != 0:
            return None
        self.directory.begin(self.config.to_yaml(), self.data.tokenizer.content)
        views, self.progress.wandb_id = self._make_views(self.progress.wandb_id, self.progress.step)
        return RunRecord(self.config, self.directory, self.progress.step, views)

    def _agree_to_end(self) -> bool:
        """Whether any rank was told to end: signals reach ranks in different steps."""
        flag = torch.tensor([float(self._ending.told)], device=self.engine.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())
