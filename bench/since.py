"""Benchmark 20: steps of the quickstart and the start of train.py, compared with an earlier commit.

Both commits train in turn, each from its own files, and each turn gives a ratio. Start is the time from the command to
the first row of metrics, with whatever is cached between runs. A step is the median time between two later rows, so it
includes what a run does between steps. A run is ended after its last row. By default the current code joins documents,
since the earlier commit has no masks. On two ranks, start includes torchrun.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path

from bench.report import Rows, verdict
from dynmoe.errors import UserError
from harness.processes import CPU, ROOT

_FIELDS = (
    "logging.interval=1", "logging.histograms_every=0", "logging.wandb=disabled", "eval.interval=0",
    "checkpoint.interval=0",
)  # fmt: skip
_STEP = 0.8
_START = 0.6
_POLL_S = 0.002
_END_S = 60.0


# The commit of the figures, which has no masks between documents.
_EARLIER = "c485d5e"
_JOINED = ["data.documents=joined"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", help="fields to override in both commits, e.g. model.hidden=256")
    parser.add_argument("--commit", default=_EARLIER, help="commit to compare with")
    parser.add_argument("--now", nargs="*", help="fields to override that the earlier commit does not have (for the "
                        "default commit: data.documents=joined)")  # fmt: skip
    parser.add_argument("--data", type=Path, default=Path("data/stdlib"), help="prepared corpus")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=40, help="steps of a run")
    parser.add_argument("--turns", type=int, default=5, help="runs of each commit, after one that is not counted")


def run(given: argparse.Namespace) -> Rows:
    if not given.data.exists():
        raise UserError(f"--data {given.data}: does not exist; run python -m data_prep stdlib --out {given.data}")
    rows = []
    now = given.now if given.now is not None else _JOINED if given.commit == _EARLIER else []
    with _checked_out(given.commit) as before:
        for ranks in given.ranks:
            turns = [(_trained(before, given, ranks, []), _trained(ROOT, given, ranks, now))
                     for _ in range(given.turns + 1)][1:]  # fmt: skip
            step, start = ([new[part] / old[part] for old, new in turns] for part in range(2))
            rows.append({
                "ranks": ranks, "since": given.commit, "turns": given.turns,
                "step": statistics.median(step), "lowest_step": min(step), "highest_step": max(step),
                "start": statistics.median(start), "lowest_start": min(start), "highest_start": max(start),
            })  # fmt: skip
    return rows


@contextlib.contextmanager
def _checked_out(commit: str) -> Iterator[Path]:
    """A directory with the files of a commit."""
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(["git", "-C", str(ROOT), "archive", commit], capture_output=True, check=False)
        if archive.returncode:
            raise UserError(f"--commit {commit}: git has no such commit here; fetch it, or name another")
        subprocess.run(["tar", "--extract", "--directory", folder], input=archive.stdout, check=True)
        yield Path(folder)


def _trained(tree: Path, given: argparse.Namespace, ranks: int, overrides: list[str]) -> tuple[float, float]:
    """Seconds of a step, and seconds until the first one ended, in a run with the files of ``tree``."""
    with tempfile.TemporaryDirectory() as name, (Path(name) / "output").open("w+") as output:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command = [
            sys.executable, *(torchrun if ranks > 1 else []), "train.py", "configs/quickstart.yaml", *_FIELDS,
            f"parallel.expert={ranks}", f"train.micro_batch={16 // ranks}", f"train.steps={given.steps}",
            f"data.dirs=[{given.data.resolve()}]", f"run.dir={name}", "run.name=run", *given.overrides, *overrides,
        ]  # fmt: skip
        environment = os.environ | CPU | {"PYTHONPATH": str(tree)}
        began = time.perf_counter()
        training = subprocess.Popen(command, cwd=tree, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            seen = list(islice(_arrivals(Path(name) / "run" / "metrics.jsonl", training), given.steps))
            if len(seen) < given.steps:
                output.seek(0)
                raise UserError(f"the run of {tree} ended after {len(seen)} steps: {output.read()[-2000:]}")
        finally:
            training.terminate()  # torchrun ends its ranks
            training.wait(_END_S)
    return statistics.median(after - before for before, after in pairwise(seen)), seen[0] - began


def _arrivals(path: Path, training: subprocess.Popen[bytes]) -> Iterator[float]:
    """When each line of a file was seen, until the training ends."""
    while not path.exists():
        if training.poll() is not None:
            return
        time.sleep(_POLL_S)
    with path.open("rb") as lines:
        while training.poll() is None:
            for _ in range(lines.read().count(b"\n")):
                yield time.perf_counter()
            time.sleep(_POLL_S)


def verdicts(rows: Rows) -> list[str]:
    return [
        verdict(f"ranks {row['ranks']}: {what} over {row['since']}", row[what], target)
        for row in rows
        for what, target in (("step", _STEP), ("start", _START))
    ]
