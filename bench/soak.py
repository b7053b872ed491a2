"""An hour of training on two ranks with a fault every minute: the same curve, constant memory, no leftover processes.

The run is slowed down, so that an undisturbed run with as many steps takes a fraction of the time. Memory and file
descriptors of each rank are sampled throughout. Growth is counted within the life of a process, after its warm-up.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import random
import resource
import signal
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import psutil

from bench.disturbed import ENGINES, DisturbedRun, make_corpus, steps_lost
from bench.memory_watch import MemoryWatch
from bench.report import Rows, verdict
from dynmoe.errors import UserError
from dynmoe.train.checkpoint import step_directories
from harness.processes import Prepare, start_server

_TIMEOUT_S = 120.0
_FIELDS = [
    "logging.interval=25", "logging.histograms_every=4", "checkpoint.interval=50", "checkpoint.asynchronous=true",
    "eval.interval=100", "logging.wandb=offline", "logging.tensorboard=true",
]  # fmt: skip
_LOOK_S = 0.5
_PR_SET_CHILD_SUBREAPER = 36


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=float, default=60.0, help="minutes of the disturbed run, without lost time")
    parser.add_argument("--every", type=float, default=60.0, help="seconds between faults")
    parser.add_argument("--pace", type=float, default=0.09, help="minimum seconds per step of the disturbed run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", default="deepspeed", choices=list(ENGINES))
    parser.add_argument("--folder", type=Path, help="folder to keep the runs in; default: a temporary folder")


def run(given: argparse.Namespace) -> Rows:
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)  # orphans become children of this process
    start_server()
    known = set(psutil.Process().children(recursive=True))
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        corpus = make_corpus(folder)
        steps = round(given.minutes * 60 / given.pace)
        fields = [*ENGINES[given.engine], *_FIELDS, f"train.steps={steps}"]

        def start(name: str, prepare: Prepare | None) -> DisturbedRun:
            return DisturbedRun(folder / name, corpus, fields, "warm", prepare)

        soak = Soak(start("disturbed", Paced(given.pace)), given.every, random.Random(given.seed))
        begun = time.monotonic()
        memory, faults = soak.last()
        lasted_s = time.monotonic() - begun
        undisturbed = start("undisturbed", None)
        with MemoryWatch(undisturbed) as undisturbed_memory:
            undisturbed.wait(lambda: False, 60 + 2 * lasted_s, every_s=_LOOK_S)
        lost = steps_lost(soak.run.result(), undisturbed.result())
    left = set(psutil.Process().children(recursive=True)) - known
    _, alive = psutil.wait_procs(left, timeout=10)
    return [
        {
            "engine": given.engine, "minutes": lasted_s / 60, "steps": steps, "faults": faults.total(),
            "kinds": ", ".join(f"{faults[name]} {name}" for name in FAULTS), "lost": lost,
            "processes": memory.lives, "measured": memory.measured,
            "mb_per_1000_steps": memory.slope(), "descriptors": memory.descriptors_gained(), "left": len(alive),
            "undisturbed_mb_per_1000_steps": undisturbed_memory.slope(),
            "undisturbed_descriptors": undisturbed_memory.descriptors_gained(),
        }
    ]  # fmt: skip


@dataclass(frozen=True)
class Paced:
    """For ``prepare``: a step takes at least ``step_s`` seconds."""

    step_s: float

    def __call__(self, rank: int) -> None:
        from dynmoe.train.trainer import Trainer

        plain = Trainer._step

        def paced(trainer: Trainer, *arguments: object) -> object:
            begun = time.monotonic()
            row = plain(trainer, *arguments)  # type: ignore[arg-type]
            time.sleep(max(0.0, begun + self.step_s - time.monotonic()))
            return row

        Trainer._step = paced  # type: ignore[assignment,method-assign]


class Soak:
    """A run that meets a fault every ``every_s`` seconds.

    Args:
        run: the started run.
        every_s: seconds between faults.
        draw: generator that selects faults and targets.
    """

    def __init__(self, run: DisturbedRun, every_s: float, draw: random.Random) -> None:
        self.run = run
        self._every_s = every_s
        self._draw = draw

    def last(self) -> tuple[MemoryWatch, Counter[str]]:
        """Runs to the end; returns memory samples of its ranks, and counts of the faults by name."""
        faults = Counter[str]()
        due = time.monotonic()
        with MemoryWatch(self.run) as memory:
            while self._lives_until(due := due + self._every_s):
                name = self._draw.choice(list(FAULTS))
                before = self.run.step
                FAULTS[name](self)
                faults[name] += 1
                if not self._goes_on(before):
                    break
                print(f"fault {faults.total()}, {name}: step {before}, continues at {self.run.step}", flush=True)
        return memory, faults

    def _lives_until(self, due: float) -> bool:
        return self.run.wait(lambda: time.monotonic() > due, self._every_s + _TIMEOUT_S, every_s=_LOOK_S)

    def _goes_on(self, before: int) -> bool:
        return self.run.wait(lambda: self.run.step > before, _TIMEOUT_S, every_s=_LOOK_S)

    def kill_rank(self) -> None:
        self.run.kill("rank", self._draw)

    def kill_launcher(self) -> None:
        self.run.kill("launcher", self._draw)
        self.run.start()

    def kill_tree(self) -> None:
        self.run.kill("tree", self._draw)
        self.run.start()

    def preempt(self) -> None:
        """Sends SIGTERM to the launcher; the run saves, ends, and is restarted."""
        self.run.training.signal(signal.SIGTERM)
        self.run.training.wait(30)
        outcome = json.loads((self.run.path / "outcome.json").read_text())
        if outcome["status"] not in ("preempted", "finished"):
            raise UserError(f"{self.run.path}: its outcome after a stop request is {outcome}")
        self.run.start()

    def stop_rank(self) -> None:
        """Stops a rank for some seconds; the other one waits."""
        with contextlib.suppress(IndexError, ProcessLookupError):
            pid = self._draw.choice(self.run.training.ranks())
            os.kill(pid, signal.SIGSTOP)
            time.sleep(self._draw.uniform(1, 5))
            os.kill(pid, signal.SIGCONT)

    def make_rank_stutter(self) -> None:
        with contextlib.suppress(IndexError, ProcessLookupError):
            pid = self._draw.choice(self.run.training.ranks())
            for _ in range(20):
                os.kill(pid, signal.SIGSTOP)
                time.sleep(self._draw.uniform(0, 0.2))
                os.kill(pid, signal.SIGCONT)
                time.sleep(self._draw.uniform(0, 0.2))

    def rot_old_checkpoint(self) -> None:
        """Changes a file of the oldest checkpoint during the run."""
        with contextlib.suppress(FileNotFoundError):  # it was just pruned
            self._damage(step_directories(self.run.checkpoints)[-1])

    def leave_rubbish(self) -> None:
        """Puts foreign files among the checkpoints."""
        (self.run.checkpoints / "latest").write_text("step_99999999")
        (self.run.checkpoints / f"step_{self._draw.randrange(10**8):08d}").touch()
        (self.run.checkpoints / f"step_00000001.tmp-{self._draw.randrange(10**8):08d}").mkdir()

    def damage_checkpoint(self) -> None:
        """Flips, truncates or removes a file of the newest checkpoint after killing the tree."""
        self.run.kill("tree", self._draw)
        self._damage(step_directories(self.run.checkpoints)[0])
        self.run.start()

    def _damage(self, checkpoint: Path) -> None:
        path = self._draw.choice(sorted(file for file in checkpoint.rglob("*") if file.is_file()))
        content = bytearray(path.read_bytes())
        place = self._draw.randrange(len(content))
        how = self._draw.choice(("flip", "cut", "remove"))
        if how == "remove":
            path.unlink()
        elif how == "cut":
            path.write_bytes(content[:place])
        else:
            content[place] ^= 1 << self._draw.randrange(8)
            path.write_bytes(content)

    def tear_files(self) -> None:
        """Kills the tree in the middle of writing a row, an event and a checkpoint."""
        self.run.kill("tree", self._draw)
        for name in ("metrics.jsonl", "events.jsonl"):
            with (self.run.path / name).open("a") as stream:
                stream.write('{"train/step": 9')
        half = self.run.checkpoints / f"step_{self.run.step + 7:08d}.tmp-0badcafe"
        half.mkdir()
        (half / "manifest.json").write_text("{")
        self.run.start()

    def fill_disk(self) -> None:
        """Limits a rank to files of 4 KiB, as on a full disk: it fails, and the ranks are restarted."""
        with contextlib.suppress(IndexError, ProcessLookupError):
            pid = self._draw.choice(self.run.training.ranks())
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (4096, 4096))
            self.run.wait(lambda: pid not in self.run.training.ranks(), _TIMEOUT_S, every_s=_LOOK_S)


FAULTS = {
    fault.__name__: fault
    for fault in (
        Soak.kill_rank, Soak.kill_launcher, Soak.kill_tree, Soak.preempt, Soak.stop_rank, Soak.make_rank_stutter,
        Soak.rot_old_checkpoint, Soak.leave_rubbish, Soak.damage_checkpoint, Soak.tear_files, Soak.fill_disk,
    )
}  # fmt: skip


def verdicts(rows: Rows) -> list[str]:
    (row,) = rows
    nothing = row["lost"] == row["left"] == row["descriptors"] == row["undisturbed_descriptors"] == 0
    return [
        verdict("growth of a rank's memory, MB per 1,000 steps", row["mb_per_1000_steps"], 1.0),
        verdict("the same in the undisturbed run", row["undisturbed_mb_per_1000_steps"], 1.0),
        f"{row['faults']} faults: {row['lost']} steps lost, {row['descriptors']} descriptors gained, {row['left']} "
        f"processes left behind: {'as required' if nothing else 'NOT as required'}",
    ]
