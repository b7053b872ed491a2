"""Shared by the fault benchmarks: a tiny run on two ranks, its curve, and faults that strike it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import signal
import sysconfig
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dynmoe.errors import UserError
from dynmoe.train import checkpoint
from dynmoe.train.checkpoint import find_corruption, latest_complete, step_directories
from harness.processes import Prepare, TorchrunTraining, Training, WarmTraining, is_running
from harness.runs import tensor_hashes, without_times

_RESTARTS = 1_000_000
# Adaptation and a budget are on: more state between steps is more that a restart can lose.
_FIELDS = [
    "run.name=run", "data.sequence_length=32", "model.hidden=32", "model.heads=2", "model.kv_heads=1",
    "model.layers=2", "model.moe.experts=4", "model.moe.expert_hidden=32", "train.global_batch=4",
    "train.micro_batch=2", "schedule.kind=constant", "schedule.warmup_steps=4", "checkpoint.interval=10",
    "eval.interval=50", "eval.batches=2", "model.router.kind=top_any", "model.router.variant=improved",
    "model.router.min_experts=0", "model.router.initial_experts=1", "model.moe.active_at_start=2",
    "budget.method=loss_free", "budget.experts_per_token=1.5", "adaptation.interval=8", "adaptation.window=5",
    "adaptation.removal_share=0.8", "logging.warn_budget_deviation=1e9", "logging.warn_expert_share=1",
    "guard.straggler_interval=0",
]  # fmt: skip
ENGINES = {
    "deepspeed": ["parallel.expert=2"],
    "megatron": ["engine=megatron", "parallel.pipeline=2"],
}


def make_corpus(folder: Path) -> Path:
    """Prepares a small corpus from the source text of Python's library."""
    from data_prep.build import build
    from data_prep.recipe import Recipe

    texts = folder / "text"
    texts.mkdir(parents=True)
    for source in sorted((Path(sysconfig.get_paths()["stdlib"]) / "asyncio").glob("*.py")):
        (texts / f"{source.stem}.txt").write_text(source.read_text())
    build(Recipe([str(texts)], vocab_size=400, validation_fraction=0.2), folder / "corpus", workers=1)
    return folder / "corpus"


class DisturbedRun:
    """A run of ``train.py`` on two ranks that is struck by faults and restarted with the same command.

    Args:
        folder: folder for the run and its output.
        corpus: prepared corpus.
        arguments: arguments in addition to those of the tiny run.
        launcher: ``warm`` forks ranks that have imported everything; or ``torchrun``.
        prepare: called in every rank of a warm launcher.
    """

    def __init__(
        self, folder: Path, corpus: Path, arguments: Sequence[str], launcher: str, prepare: Prepare | None = None
    ) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self.path = folder / "run"
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / "metrics.jsonl"
        fields = [f"data.dirs=[{corpus}]", f"run.dir={folder}", *_FIELDS, *arguments]
        self._start: Callable[[Path], Training] = (
            (lambda output: WarmTraining(fields, 2, _RESTARTS, output, {}, prepare))
            if launcher == "warm"
            else (lambda output: TorchrunTraining(fields, 2, _RESTARTS, output, {}))
        )
        self.starts = 0
        self._reader = LastStep(self.metrics)
        self.start()

    def start(self) -> None:
        """Starts the same command again."""
        self.training = self._start(self.folder / f"output_{self.starts}.txt")
        self.starts += 1

    @property
    def step(self) -> int:
        """The last step with a row; 0 before the first."""
        return self._reader.read()

    def wait(self, until: Callable[[], bool], timeout_s: float, every_s: float = 0.0005) -> bool:
        """Waits until a condition holds, checking every ``every_s`` seconds; returns whether it did before the run
        ended.

        Raises:
            UserError: it took too long, or the launcher failed.
        """
        deadline = time.monotonic() + timeout_s
        while not until():
            status = self.training.poll()
            if status == 0:
                return False
            if status is not None or time.monotonic() > deadline:
                self.training.kill_tree()
                why = f"nothing happened in {timeout_s:g} s" if status is None else f"it ended with status {status}"
                raise UserError(f"{self.path}: {why}; see {self.folder / f'output_{self.starts - 1}.txt'}")
            time.sleep(every_s)
        return True

    def kill(self, victim: str, draw: random.Random) -> None:
        """Sends SIGKILL to one ``rank``, to the ``launcher`` or to the ``tree``, and checks what must end with it.

        Raises:
            UserError: ranks outlived their launcher, or an incomplete checkpoint has the name of a complete one.
        """
        ranks = self.training.ranks()
        if victim == "rank":
            if ranks:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(draw.choice(ranks), signal.SIGKILL)
        else:
            ranks = self.training.kill_launcher() if victim == "launcher" else self.training.kill_tree()
        deadline = time.monotonic() + 30
        while any(is_running(pid) for pid in ranks):
            if time.monotonic() > deadline:
                raise UserError(f"{self.path}: rank(s) {ranks} outlived the kill of {victim}")
            time.sleep(0.001)
        for path in step_directories(self.checkpoints):
            if (problem := find_corruption(path)) is not None and path.exists():
                raise UserError(f"{path}: {problem}, though it is named like a whole one")

    def result(self) -> dict[str, Any]:
        return result_of(self.path)


def result_of(run: Path) -> dict[str, Any]:
    """Everything that must equal an undisturbed run: every row, every event, the final parameters.

    Raises:
        UserError: there is no run, or it has no checkpoint.
    """
    rows = {}
    try:
        for line in (run / "metrics.jsonl").read_text().splitlines():
            row = json.loads(line)
            rows[int(row["train/step"])] = without_times(row)
        events = hashlib.sha256((run / "events.jsonl").read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}; name the directory of a run that has ended") from None
    newest = latest_complete(run / "checkpoints")
    if newest is None:
        raise UserError(f"{run}: no checkpoint; use the directory of a finished run")
    return {"rows": rows, "tensors": tensor_hashes(newest.path), "events": events}


def slow_disk(rank: int) -> None:
    """For ``prepare``: syncing a directory takes 5 ms, as on a spinning disk.

    On a fast disk only microseconds pass between a checkpoint's manifest and its rename, too few for a fault to strike.
    """
    sync = checkpoint._sync

    def slow(path: Path) -> None:
        sync(path)
        time.sleep(0.005)

    checkpoint._sync = slow


def steps_lost(result: dict[str, Any], reference: dict[str, Any]) -> int:
    """Number of rows that are missing, extra, or different in any bit, compared with the undisturbed run.

    If the rows agree but events or parameters differ, all steps count.
    """
    rows = result["rows"]
    wanted = reference["rows"]
    lost = sum(rows.get(step) != wanted.get(step) for step in rows.keys() | wanted.keys())
    same = all(result[part] == reference[part] for part in ("tensors", "events"))
    return lost if lost or same else len(wanted)


class LastStep:
    """Reads the last step of a growing file of rows, from where it stopped before."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inode = 0
        self._offset = 0
        self._step = 0

    def read(self) -> int:
        try:
            stat = self._path.stat()
        except FileNotFoundError:
            return 0
        if (stat.st_ino, stat.st_size) == (self._inode, self._offset):
            return self._step
        if stat.st_ino != self._inode:  # a resumed start rewrites the file
            self._inode = stat.st_ino
            self._offset = 0
            self._step = 0
        with self._path.open() as stream:
            stream.seek(self._offset)
            while (line := stream.readline()).endswith("\n"):
                self._step = int(json.loads(line)["train/step"])
                self._offset += len(line)
        return self._step
