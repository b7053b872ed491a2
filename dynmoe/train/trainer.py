"""The training loop: resume, steps, evaluation, checkpoints, end of the run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

from dynmoe.config import Config
from dynmoe.data.batches import PretrainingData
from dynmoe.data.loader import Loader
from dynmoe.errors import UserError
from dynmoe.launched import StopSignal
from dynmoe.model.size import ModelSize
from dynmoe.moe.adaptation import AdaptationEvent
from dynmoe.moe.trace import RoutingTrace
from dynmoe.train.accounting import Account, Progress
from dynmoe.train.checkpoint_store import CheckpointStore
from dynmoe.train.engine import Engine, Gradients
from dynmoe.train.evaluation import Evaluation
from dynmoe.train.guard import StepGuard
from dynmoe.train.metrics import Row, View, histograms
from dynmoe.train.record import RunRecord
from dynmoe.train.replay import ReplaySource
from dynmoe.train.resume import check_unchanged, describe_new_order, with_kept_fields
from dynmoe.train.run_directory import RunDirectory
from dynmoe.train.schedule import learning_rate
from dynmoe.train.speed import SpeedComparison
from dynmoe.train.traces import write_trace
from dynmoe.train.watchdog import Watchdog


@dataclass(frozen=True)
class Result:
    """Result of one start of a run; the status is ``finished`` or ``preempted``."""

    status: str
    progress: Progress
    last_row: Row


class Trainer:
    """Runs the remaining steps of a run.

    Args:
        config: configuration of the run.
        engine: model and optimizer.
        data: training and validation samples.
        directory: directory of the run; claimed by rank 0.
        vocab_size: rows of the model's embedding.
        make_views: creates the views of the metrics on rank 0, given the W&B id of an earlier start and the step from
            which this one resumes.
        stop_signal: the stop request.
        watchdog: notified of progress.
        score: computes the scores of tasks and domains, given the configuration and the number of sequences of each
            domain; returns metrics that are the same on every rank; collective.
    """

    def __init__(
        self,
        config: Config,
        engine: Engine,
        data: PretrainingData,
        directory: RunDirectory,
        vocab_size: int,
        make_views: Callable[[str | None, int], tuple[list[View], str | None]],
        stop_signal: StopSignal,
        watchdog: Watchdog,
        score: Callable[[Config, Mapping[str, int]], Row],
    ) -> None:
        self.config = config
        self.engine = engine
        self.data = data
        self.directory = directory
        self.size = ModelSize(config.model, vocab_size, config.data.sequence_length)
        self.checkpoints = CheckpointStore(directory.checkpoints, config.checkpoint.keep, config.checkpoint.milestones)
        self.progress = Progress()
        self._make_views = make_views
        self._stop_signal = stop_signal
        self._watchdog = watchdog
        self._score = score
        self._speed = SpeedComparison(config.guard, engine.local_modules, engine.device)
        replay = config.train.replay
        self._replay = None if replay is None else ReplaySource(replay, directory.traces)
        on_gpu = engine.device.type == "cuda"
        self._loader = Loader(data, config.train, engine.data_rank, engine.data_size, pin=on_gpu)

    def run(self) -> Result:
        """Resumes from the latest checkpoint, trains until the last step or a stop request, and saves a checkpoint."""
        self.config = self._resume()
        self.data.settle(self.config.data)
        if self._replay is not None:
            self._replay.check_steps(self.progress.step + 1, self.config.train.steps)
        self._watchdog.progress("the order of the samples")
        self._evaluation = Evaluation(self.config, self.engine, self.data)
        record = self._begin()
        row: Row = {} if record is None else record.last_row
        self._guard = StepGuard(self.config.guard, self.progress.guard)
        self._account = Account(self.config, self.engine, self.size, self.progress)
        self._stop_signal.has_state_to_save()
        if record is not None and self.progress.step >= self.config.train.steps:
            done = f"step {self.progress.step} of train.steps={self.config.train.steps} was reached before"
            print(f"{self.directory.path}: {done}; for another training, set run.name or more steps", flush=True)
        try:
            while self.progress.step < self.config.train.steps:
                row = self._step(record) or row
                is_last = self.progress.step == self.config.train.steps
                stops = self._stop_requested()
                if stops or is_last or self._due(self.config.checkpoint.interval):
                    self._save()
                if stops and not is_last:
                    self.checkpoints.wait()
                    if record is not None:
                        self.directory.write_outcome("preempted", self.progress.step)
                    dist.barrier()  # no rank exits before the outcome is written, as its launcher would read it
                    return Result("preempted", self.progress, row)
            self.checkpoints.wait()
            return Result("finished", self.progress, row)
        except Exception as error:
            self.directory.write_outcome("failed", self.progress.step, error=f"{type(error).__name__}: {error}")
            raise
        finally:
            self._loader.close()
            if record is not None:
                record.close()

    def _step(self, record: RunRecord | None) -> Row | None:
        """Runs one optimizer step; returns its row of metrics, if one is due."""
        config = self.config
        step = self.progress.step + 1
        evaluates = config.eval.evaluates(step, config.train.steps)
        scores = config.eval.scores(step, config.train.steps)
        logs = evaluates or scores or step % config.logging.interval == 0
        lr = learning_rate(step, config.train.steps, config.optimizer, config.schedule)
        gradients = self._compute_gradients(step, record=logs)
        events = self._apply(gradients, step, lr, record)
        slow = self._speed.after_step(step)
        if record is not None:
            record.add_events(events)
            for text in slow:
                record.add_incident(step, "straggler", text)
        self._account.add_step()
        if not logs:
            return None
        report = self._account.take_report()
        row = self._account.row(report, gradients, lr)
        if evaluates:
            self._watchdog.progress(f"the evaluation after step {step}")
            row |= self._evaluation.row()
        if scores:
            self._watchdog.progress(f"the scores after step {step}")
            row |= self._score(self.config, self._evaluation.sequences)
        if record is not None:
            draws = gradients.finite and (config.logging.draws_histograms(step) or step == config.train.steps)
            record.add_row(row, histograms(report, config, step) if draws else None)
        self._account.start_interval()
        return row

    def _compute_gradients(self, step: int, record: bool) -> Gradients:
        """Runs the forward and backward passes of a step, replayed if configured; writes their trace if one is due."""
        self._watchdog.progress(f"step {step}")
        with self._speed.loading():
            samples, batches = self._loader.take(self.progress.samples, continues=step < self.config.train.steps)
        positions_P = self.engine.positions(self.config.data.sequence_length)
        replay = None
        if self._replay is not None:
            replay = self._replay.read(step, self.engine.layers, samples, batches, positions_P)
        trace = RoutingTrace() if self.config.logging.traces(step) else None
        gradients = self.engine.compute_gradients(batches, record, trace, replay)
        if trace is not None:
            write_trace(self.directory.traces, step, self.engine.rank, trace, samples, batches, positions_P)
        return gradients

    def _apply(self, gradients: Gradients, step: int, lr: float, record: RunRecord | None) -> list[AdaptationEvent]:
        """Updates the model with a step's gradients, or skips the step if the guard rejects it."""
        guard = self._guard
        if guard.is_nonfinite(gradients):
            kind = "not finite"
            text = self.engine.describe_nonfinite()
            limit = f"guard.max_consecutive_nonfinite_steps={guard.config.max_consecutive_nonfinite_steps}"
            if guard.gives_up:
                cure = "resume from a checkpoint with a lower optimizer.lr or more schedule.warmup_steps"
                raise UserError(f"step {step}: {text}; {limit} was reached; {cure}")
            text = f"{text}; skipped ({guard.state.bad_in_a_row} consecutive, {limit})"
        elif (spike := guard.spike(gradients)) is not None:
            kind = "spike"
            text = spike
        else:
            return self.engine.update(lr)
        if record is not None:
            record.add_incident(step, kind, text)
        return self.engine.skip()

    def _due(self, interval: int) -> bool:
        return interval > 0 and self.progress.step % interval == 0

    def _save(self) -> None:
        self._watchdog.progress(f"the checkpoint of step {self.progress.step}")
        self._account.take_report()
        self._account.read_clock()
        data = [corpus.fingerprint for corpus in self.data.corpora]
        config = dataclasses.asdict(self.config)
        state = {"progress": dataclasses.asdict(self.progress), "config": config, "data": data}
        facts = {
            "ranks": self.engine.world_size,
            "parallel": config["parallel"],
            "config": self.config.digest(),
            "data": data,
        }
        self.checkpoints.begin(self.progress.step, self.engine.snapshot, state, facts)
        if not self.config.checkpoint.asynchronous:
            self.checkpoints.wait()
        self._account.start_interval()

    def _resume(self) -> Config:
        """Loads the latest checkpoint; returns the configuration with the fields that a run keeps."""
        self._watchdog.progress("the resume")
        self.checkpoints.check_shared()
        self.checkpoints.remove_leftovers()
        checkpoint = self.checkpoints.newest(self._watchdog.progress)
        if checkpoint is None:
            return with_kept_fields(self.config, None)
        state = checkpoint.trainer_state
        self.progress = Progress.of(state["progress"])
        has_begun = self.progress.samples > 0
        config = with_kept_fields(self.config, state["config"] if has_begun else None)
        changed = check_unchanged(state["config"], dataclasses.asdict(config), has_begun)
        new_order = describe_new_order(changed, self.progress.samples) if has_begun else None
        if new_order is not None and self.engine.rank == 0:
            print(new_order)
        if has_begun and state["data"] != [corpus.fingerprint for corpus in self.data.corpora]:
            raise UserError(
                "data.dirs: differs from the text of this run's training; restore it or use another run.name"
            )
        tokenizer = self.directory.tokenizer
        if not has_begun and tokenizer.exists() and not self.data.tokenizer.reads_like(tokenizer.read_bytes()):
            problem = "the tokenizer differs from the one that the weights were trained with"
            raise UserError(f"data.dirs: {problem}; prepare the corpora with --tokenizer {tokenizer}")
        self._watchdog.progress(f"loading {checkpoint.path.name}")
        self.engine.load(checkpoint.path)
        self.engine.step = self.progress.step
        return config

    def _begin(self) -> RunRecord | None:
        """Opens the record on rank 0, which also keeps the W&B id, as it writes the trainer's state."""
        if self.engine.rank != 0:
            return None
        self.directory.begin(self.config.to_yaml(), self.data.tokenizer.files)
        views, self.progress.wandb_id = self._make_views(self.progress.wandb_id, self.progress.step)
        return RunRecord(self.config, self.directory, self.progress.step, views)

    def _stop_requested(self) -> bool:
        """Whether any rank has a stop request; also advances a save if no rank is busy with it."""
        # Signals may reach the ranks in different steps.
        flags = torch.tensor(
            [float(self._stop_signal.requested), float(self.checkpoints.busy)], device=self.engine.device
        )
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        requested, busy = flags.tolist()
        if self.checkpoints.saving and not busy:
            self.checkpoints.advance()
        return bool(requested)
