"""The order of a run: resume, steps, evaluation, checkpoints, end. What happens in each lies elsewhere."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from dynmoe.config import Config
from dynmoe.data.batches import PretrainingData
from dynmoe.data.loader import Loader
from dynmoe.errors import UserError
from dynmoe.launched import Ending
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
from dynmoe.train.resume import refuse_changes, with_weighting
from dynmoe.train.run_directory import RunDirectory
from dynmoe.train.schedule import learning_rate
from dynmoe.train.speed import SpeedComparison
from dynmoe.train.traces import write_trace
from dynmoe.train.watchdog import Watchdog


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
        watchdog: is told of progress.
        score: gives the scores of tasks and domains as metrics, the same on every rank, where it is told how many
            sequences of each domain to read; collective.
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
        watchdog: Watchdog,
        score: Callable[[Mapping[str, int]], Row],
    ) -> None:
        self.config, self.engine, self.data, self.directory = config, engine, data, directory
        self.size = ModelSize(config.model, vocab_size, config.data.sequence_length)
        kept = config.checkpoint
        self.checkpoints = CheckpointStore(directory.checkpoints, kept.keep, kept.milestones)
        self.progress = Progress()
        self._make_views = make_views
        self._ending, self._watchdog, self._score = ending, watchdog, score
        self._speed = SpeedComparison(config.guard, engine.local_modules, engine.device)
        on_gpu = engine.device.type == "cuda"
        self._loader = Loader(data, config.train, engine.data_rank, engine.data_size, pin=on_gpu)

    def run(self) -> Result:
        """Resumes where a checkpoint is, trains to the last step or until told to end, and leaves a checkpoint."""
        train = self.config.train
        self.config = with_weighting(self.config, self._resume())
        self._watchdog.progress("the order of the samples")
        self._evaluation = Evaluation(self.config, self.engine, self.data)
        record = self._begin()
        row: Row = {} if record is None else record.last_row
        self._guard = StepGuard(self.config.guard, self.progress.guard)
        self._account = Account(self.config, self.engine, self.size, self.progress)
        self._ending.has_state_to_save()
        try:
            while self.progress.step < train.steps:
                row = self._step(record) or row
                ends = self._agree()
                if ends or self._due(self.config.checkpoint.interval) or self.progress.step == train.steps:
                    self._save()
                if ends and self.progress.step < train.steps:
                    self.checkpoints.wait()
                    if record is not None:
                        self.directory.write_outcome("preempted", self.progress.step)
                    dist.barrier()  # before any launcher looks for the outcome
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
        """One optimizer step, and its row of metrics where one is due."""
        config = self.config
        step = self.progress.step + 1
        evaluates, scores = (due(step, config.train.steps) for due in (config.eval.evaluates, config.eval.scores))
        logs = evaluates or scores or step % config.logging.interval == 0
        lr = learning_rate(step, config.train.steps, config.optimizer, config.schedule)
        gradients = self._compute_gradients(step, record=logs)
        events = self._use(gradients, step, lr, record)
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
            row |= self._score(self._evaluation.sequences)
        if record is not None:
            draws = gradients.finite and (config.logging.draws_histograms(step) or step == config.train.steps)
            record.add_row(row, histograms(report, config, step) if draws else None)
        self._account.start_interval()
        return row

    def _compute_gradients(self, step: int, record: bool) -> Gradients:
        """Forward and backward passes of a step, and their trace where one is due."""
        self._watchdog.progress(f"step {step}")
        with self._speed.loading():
            samples, batches = self._loader.take(self.progress.samples, goes_on=step < self.config.train.steps)
        if not self.config.logging.traces(step):
            return self.engine.compute_gradients(batches, record)
        trace = self.engine.context.trace = RoutingTrace()
        gradients = self.engine.compute_gradients(batches, record)
        self.engine.context.trace = None
        positions_P = self.engine.positions(self.config.data.sequence_length)
        write_trace(self.directory.traces, step, self.engine.rank, trace, samples, batches, positions_P)
        return gradients

    def _use(self, gradients: Gradients, step: int, lr: float, record: RunRecord | None) -> list[AdaptationEvent]:
        """Lets the optimizer have a step's gradients, unless they would spoil the model."""
        guard = self._guard
        if guard.is_bad(gradients):
            text, count = self.engine.describe_nonfinite(), guard.state.bad_in_a_row
            if guard.gives_up:
                cure = "go on from a checkpoint with a lower optimizer.lr or another train.seed"
                raise UserError(f"step {step}: {text}; guard.bad_steps={count} in a row were not finite; {cure}")
            kind, text = "not finite", f"{text}; left out ({count} in a row, guard.bad_steps={guard.config.bad_steps})"
        elif (spike := guard.spike(gradients)) is not None:
            kind, text = "spike", spike
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
        data, config = [corpus.fingerprint for corpus in self.data.corpora], dataclasses.asdict(self.config)
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

    def _resume(self) -> dict[str, Any] | None:
        """Goes on from the newest checkpoint; returns the configuration that a run which has begun was saved with."""
        self._watchdog.progress("the resumption")
        self.checkpoints.check_shared()
        self.checkpoints.remove_leftovers()
        checkpoint = self.checkpoints.newest(self._watchdog.progress)
        if checkpoint is None:
            return None
        state = checkpoint.trainer_state
        self.progress = Progress.of(state["progress"])
        has_begun = self.progress.samples > 0
        refuse_changes(state["config"], dataclasses.asdict(self.config), has_begun)
        if has_begun and state["data"] != [corpus.fingerprint for corpus in self.data.corpora]:
            raise UserError("data.dirs: not the text that this run was trained on; restore it or use another run.name")
        tokenizer = self.directory.tokenizer
        if not has_begun and tokenizer.exists() and tokenizer.read_bytes() != self.data.tokenizer.content:
            cure = f"prepare them with --tokenizer {tokenizer}"
            raise UserError(f"data.dirs: encoded by another tokenizer than the weights were trained with; {cure}")
        self._watchdog.progress(f"loading {checkpoint.path.name}")
        self.engine.load(checkpoint.path)
        self.engine.step = self.progress.step
        return state["config"] if has_begun else None

    def _begin(self) -> RunRecord | None:
        """Opens the record on the first rank, which alone keeps the W&B id: it writes the trainer's state."""
        if self.engine.rank != 0:
            return None
        self.directory.begin(self.config.to_yaml(), self.data.tokenizer.content)
        views, self.progress.wandb_id = self._make_views(self.progress.wandb_id, self.progress.step)
        return RunRecord(self.config, self.directory, self.progress.step, views)

    def _agree(self) -> bool:
        """Whether any rank was told to end: signals reach ranks in different steps. A save goes on where all can."""
        flags = torch.tensor([float(self._ending.told), float(self.checkpoints.busy)], device=self.engine.device)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        told, busy = flags.tolist()
        if self.checkpoints.saving and not busy:
            self.checkpoints.advance()
        return bool(told)
