"""Kills ranks, launchers and whole trees at random times, half of them during a save.

Every run is compared bitwise with an undisturbed one: metric rows, events, final parameters. A step is lost if its row
is missing or different. It is replayed if it was taken before a kill and had to be repeated.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from bench.disturbed import ENGINES, DisturbedRun, make_corpus, result_of, slow_disk, steps_lost
from bench.report import Rows
from dynmoe.train.checkpoint import latest_complete

_TIMEOUT_S = 120.0
_VICTIMS = ("rank", "rank", "launcher", "tree")
# Events of a save, each with the seconds after it over which kills are spread: the directory appears, the manifest, the
# renamed checkpoint, the remains of the oldest one.
_MOMENTS = (
    ("step_*.tmp-*", 0.05),
    ("step_*.tmp-*/manifest.json", 0.005),
    ("step_" + "[0-9]" * 8, 0.02),
    ("step_*.removed", 0.0),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kills", type=int, default=20, help="number of kills per engine")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engines", nargs="*", default=list(ENGINES), choices=list(ENGINES))
    parser.add_argument(
        "--steps", type=int, default=300, help="steps per run; runs are started until all kills are done"
    )
    parser.add_argument("--launcher", default="warm", choices=("warm", "torchrun"), help="warm: forks after imports")
    parser.add_argument("--folder", type=Path, help="folder to keep the runs in; default: a temporary folder")
    parser.add_argument(
        "--compare", nargs=2, type=Path, metavar=("RUN", "UNDISTURBED"), help="kill nothing, only compare two runs"
    )


def run(given: argparse.Namespace) -> Rows:
    if given.compare:
        disturbed, wanted = (result_of(path) for path in given.compare)
        return [{"run": str(given.compare[0]), "steps": len(wanted["rows"]), "lost": steps_lost(disturbed, wanted)}]
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        corpus = make_corpus(folder)
        return [row for engine in given.engines for row in Campaign(given, engine, folder / engine, corpus).rows()]


class Campaign:
    """Kills under one engine, half with synchronous saves, half with asynchronous ones.

    Args:
        given: the command line.
        engine: engine that trains.
        folder: folder for the runs.
        corpus: corpus to train on.
    """

    def __init__(self, given: argparse.Namespace, engine: str, folder: Path, corpus: Path) -> None:
        self._given = given
        self._engine = engine
        self._folder = folder
        self._corpus = corpus
        self._draw = random.Random(f"{given.seed} {engine}")

    def rows(self) -> Rows:
        reference = self._start("undisturbed", asynchronous=False)
        reference.wait(lambda: False, 60 + self._given.steps)
        wanted = reference.result()
        half = self._given.kills // 2
        return [self._mode("synchronous", self._given.kills - half, wanted), self._mode("asynchronous", half, wanted)]

    def _start(self, name: str, asynchronous: bool) -> DisturbedRun:
        arguments = [
            *ENGINES[self._engine], f"train.steps={self._given.steps}", "logging.interval=1",
            f"checkpoint.asynchronous={str(asynchronous).lower()}",
        ]  # fmt: skip
        return DisturbedRun(self._folder / name, self._corpus, arguments, self._given.launcher, slow_disk)

    def _mode(self, saving: str, kills: int, wanted: dict[str, Any]) -> dict[str, Any]:
        counts = Counter[str]()
        recovery = list[float]()
        starts = 0
        while counts["kills"] < kills:
            run = self._start(f"{saving}_{starts}", saving == "asynchronous")
            starts += 1
            while counts["kills"] < kills and self._strike(run, counts, recovery):
                pass
            run.wait(lambda: False, 60 + self._given.steps)
            counts["lost"] += steps_lost(run.result(), wanted)
            counts["steps"] += self._given.steps
            print(f"{self._engine}, {saving}: {counts['kills']} kills, {counts['lost']} steps lost", flush=True)
        return {
            "engine": self._engine, "saves": saving, "started by": self._given.launcher, "kills": counts["kills"],
            **{victim: counts[victim] for victim in dict.fromkeys(_VICTIMS)},
            "in a save": counts["writing"] + counts["committing"] + counts["removing"],
            **{phase: counts[phase] for phase in ("writing", "committing", "removing")},
            "restarts": counts["kills"], "runs": starts, "steps": counts["steps"], "replayed": counts["replayed"],
            "most replayed": counts["most"], "lost": counts["lost"],
            "recovery_s": statistics.median(recovery), "slowest_s": max(recovery),
        }  # fmt: skip

    def _strike(self, run: DisturbedRun, counts: Counter[str], recovery: list[float]) -> bool:
        """Kills once and waits for the recovery; returns False if the run ended before."""
        aimed = self._draw.random() < 0.5
        victim = self._draw.choice(_VICTIMS)
        begun = run.step
        if not run.wait(lambda: run.step > begun, _TIMEOUT_S):
            return False
        if aimed:
            pattern, within_s = self._draw.choice(_MOMENTS)
            known = set(run.checkpoints.glob(pattern))
            if not run.wait(lambda: bool(set(run.checkpoints.glob(pattern)) - known), _TIMEOUT_S):
                return False
            time.sleep(self._draw.uniform(0, within_s))
        else:
            deadline = time.monotonic() + self._draw.uniform(0, 1.5)
            if not run.wait(lambda: time.monotonic() > deadline, _TIMEOUT_S):
                return False
        if run.training.poll() is not None:
            return False
        run.kill(victim, self._draw)
        killed = time.monotonic()
        before = run.step
        counts.update({"kills": 1, victim: 1})
        for phase in _phases(run.checkpoints):
            counts[phase] += 1
        if victim != "rank":
            run.start()
        newest = latest_complete(run.checkpoints)
        resumed = 0 if newest is None else newest.step
        run.wait(lambda: run.step < before or resumed == before, _TIMEOUT_S)  # rows after the checkpoint are removed
        run.wait(lambda: run.step > resumed, _TIMEOUT_S)
        recovery.append(time.monotonic() - killed)
        counts["replayed"] += before - resumed
        counts["most"] = max(counts["most"], before - resumed)
        return True


def _phases(checkpoints: Path) -> list[str]:
    """The phase of a save that a kill interrupted, by the files that it left."""
    unfinished = list(checkpoints.glob("step_*.tmp-*"))
    found = ["committing" if (path / "manifest.json").exists() else "writing" for path in unfinished]
    return [*found, *("removing" for _ in checkpoints.glob("step_*.removed"))]


def verdicts(rows: Rows) -> list[str]:
    kills = sum(row.get("kills", 0) for row in rows)
    lost = sum(row["lost"] for row in rows)
    struck = f"{kills} kills, " if kills else ""
    return [f"{struck}{lost} steps lost: {'as required' if lost == 0 else 'NOT as required'}"]
