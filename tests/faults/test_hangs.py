"""F21 and F22: a hanging or diverging rank ends the run with a report; a slow rank is reported."""

from __future__ import annotations

import contextlib
import functools
import json
import multiprocessing
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dynmoe.config.guard import GuardConfig
from dynmoe.train import watchdog
from dynmoe.train.speed import SpeedComparison
from harness.processes import start_server
from tests.faults.injection import replace
from tests.train.cases import TrainingProcess, read_rows

pytestmark = pytest.mark.alone

TIMEOUT_S = 3.0


def divert(rank: int, victim: int, place: str, call: int, way: str) -> None:
    """Lets one rank sleep, or join another collective than the others, in the ``call``-th call of ``place``."""

    def make(function: Any) -> Any:
        calls = 0

        @functools.wraps(function)
        def diverted(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == call:
                if way == "sleeps":
                    time.sleep(600)
                dist.all_gather_object([None, None], "another collective")
            return function(*arguments, **options)

        return diverted

    if rank == victim:
        replace(place, make)


HANGS = {
    "sleeps in the forward pass": ("dynmoe.moe.layer:MoELayer.forward", 25, "sleeps"),
    "sleeps in a save": ("dynmoe.train.checkpoint_store:CheckpointStore.advance", 2, "sleeps"),
    "calls another collective": ("dynmoe.train.trainer:Trainer._stop_requested", 7, "other"),
}


@pytest.mark.parametrize(
    "hang", [pytest.param(name, marks=pytest.mark.slow if name == "sleeps in a save" else ()) for name in HANGS]
)
def test_f21_hanging_rank_ends_the_run_and_is_named(corpus_dir, tmp_path, hang):
    place, call, way = HANGS[hang]
    prepare = functools.partial(divert, victim=1, place=place, call=call, way=way)
    failures = tmp_path / "failures"
    process = TrainingProcess(
        corpus_dir, tmp_path / "runs", f"guard.hang_timeout_s={TIMEOUT_S}", prepare=prepare,
        environment={"DYNMOE_FAILURES": str(failures)},
    )  # fmt: skip
    run = tmp_path / "runs" / "tiny"
    process.wait_for_row(run / "metrics.jsonl", 6)
    (run / "logs" / "hangs").mkdir(parents=True, exist_ok=True)
    for rank in (2, 3):  # of an earlier start with four ranks
        (run / "logs" / "hangs" / f"rank_{rank}.json").write_text(f'{{"rank": {rank}}}')
    start = time.monotonic()
    assert process.wait() != 0
    assert time.monotonic() - start < TIMEOUT_S + 20
    output = process.output()
    assert f"no progress for {TIMEOUT_S:g} s (guard.hang_timeout_s), in " in output
    waiting = [line for line in output.splitlines() if " waits in gloo:" in line]
    assert any("rank 0 on " in line for line in waiting)
    if way == "sleeps":
        assert "rank 1 on " in next(line for line in output.splitlines() if "waits in no collective: it is at " in line)
        assert "test_hangs.py" in output, "where it sleeps"
    else:
        assert any("rank 1 on " in line for line in waiting), "in another collective"
    reports = {path.name for path in (run / "logs" / "hangs").iterdir()}
    assert {f"{kind}_{rank}{end}" for rank in (0, 1) for kind, end in (("rank", ".json"), ("rank", ".txt"))} <= reports
    stacks = (run / "logs" / "hangs" / "rank_0.txt").read_text()
    assert "trainer.py" in stacks
    recorder = (run / "logs" / "hangs" / "flight_recorder_rank_0").read_bytes()
    assert b"gloo:" in recorder
    failure = json.loads(next(failures.glob("rank_*.json")).read_text())
    assert failure["text"].startswith("no progress for"), "which the launcher prints"
    assert not failure["by_user"], "a restart may succeed"


@pytest.mark.slow  # a launcher waits before it kills a rank
def test_f21_stopped_rank_is_reported_and_continues_after_sigcont(corpus_dir, tmp_path, undisturbed):
    run = tmp_path / "runs" / "tiny"
    process = TrainingProcess(corpus_dir, tmp_path / "runs", f"guard.hang_timeout_s={TIMEOUT_S}")
    process.wait_for_row(run / "metrics.jsonl", 8)
    for pid in process.ranks():  # like a suspended laptop: no rank counts as hanging
        os.kill(pid, signal.SIGSTOP)
    time.sleep(TIMEOUT_S + 15)  # longer than the timeout of the observer process
    for pid in process.ranks():
        os.kill(pid, signal.SIGCONT)
    process.wait_for_row(run / "metrics.jsonl", 12)
    os.kill(process.ranks()[1], signal.SIGSTOP)
    assert process.wait() != 0
    assert "rank 1 has not reported: it is stopped, has exited, or has no watchdog" in process.output()
    assert "rank 0 on " in process.output()


def never_release_the_gil(folder: Path) -> None:
    """Runs a thread that never releases the GIL, under a watchdog."""
    with watched(folder, timeout_s=0.5) as progress:
        progress("a step")
        time.sleep(0.2)
        re.match("(a+)+$", 40 * "a" + "b")


def go_on(folder: Path) -> None:
    """Runs under a watchdog; creates files when it may be stopped and when it has continued for a while."""
    with watched(folder, timeout_s=0.5) as progress:
        for name, seconds in (("begun", 0.5), ("going", 1.0), ("done", 0.0)):
            (folder / name).touch()
            end = time.monotonic() + seconds
            while time.monotonic() < end:  # busy, so that the watchdog's thread is not the first to run after a stop
                progress("a step")


@contextlib.contextmanager
def watched(folder: Path, timeout_s: float) -> Iterator[Callable[[str], None]]:
    watchdog._TIME_TO_REPORT_S = 0.1
    with (folder / "output").open("w") as stream:
        os.dup2(stream.fileno(), 2)
    yield watchdog.Watchdog(folder, timeout_s).progress


def start(function: Callable[[Path], None], folder: Path) -> multiprocessing.process.BaseProcess:
    """Calls a function in a process forked from a server with all imports."""
    start_server()
    process = multiprocessing.get_context("forkserver").Process(target=function, args=(folder,))
    process.start()
    return process


def test_f21_thread_that_never_releases_the_gil(tmp_path):
    """No other Python thread can run, including the watchdog; the stacks are written and the rank is killed anyway."""
    process = start(never_release_the_gil, tmp_path)
    process.join(20)
    assert process.exitcode == -signal.SIGKILL
    said = (tmp_path / "output").read_text()
    assert "in never_release_the_gil" in said
    assert "in _watch" in said, "the stacks of all threads"
    assert "one thread does not release the GIL; killed" in said


def test_f21_stop_longer_than_all_timeouts_is_not_a_hang(tmp_path):
    process = start(go_on, tmp_path)
    wait_for(tmp_path / "begun")
    time.sleep(0.2)
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(2.0)
    os.kill(process.pid, signal.SIGCONT)
    process.join(20)
    assert (process.exitcode, (tmp_path / "done").exists()) == (0, True), (tmp_path / "output").read_text()


def wait_for(path: Path, timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.01)


def never_end(rank: int) -> None:
    """Lets destroy_process_group wait, as for a rank that is gone."""
    replace("torch.distributed:destroy_process_group", lambda function: lambda: time.sleep(600))


def test_f21_hang_at_the_end_of_a_run(corpus_dir, tmp_path):
    fields = ["train.steps=2", "adaptation.interval=0", "parallel.expert=1", f"guard.hang_timeout_s={TIMEOUT_S}"]
    process = TrainingProcess(corpus_dir, tmp_path / "runs", *fields, ranks=1, prepare=never_end)
    assert process.wait(40) != 0
    said = process.output()
    assert f"no progress for {TIMEOUT_S:g} s (guard.hang_timeout_s), in the end of the process groups" in said
    assert json.loads((tmp_path / "runs" / "tiny" / "outcome.json").read_text())["status"] == "finished"


class Slow(nn.Module):
    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(self.seconds)
        return x


def compare_speeds(computing: list[float], loading: list[float], steps: int) -> list[tuple[int, str]]:
    """Messages after each step, for ranks with these seconds per forward pass and for loading."""
    rank = dist.get_rank()
    module = Slow(computing[rank])
    speed = SpeedComparison(GuardConfig(straggler_interval=5, straggler_ratio=1.5), [module], torch.device("cpu"))
    told = []
    for step in range(1, steps + 1):
        with speed.loading():
            time.sleep(loading[rank])
        module(torch.zeros(1))
        dist.barrier()
        told += [(step, text) for text in speed.after_step(step)]
    return told


@pytest.mark.parametrize(
    ("computing", "loading", "said"),
    [
        ([0.01, 0.03], [0.0, 0.0], "x the usual time for the same computation"),
        ([0.01, 0.01], [0.001, 0.05], "loading data takes"),
        ([0.01, 0.011], [0.001, 0.003], None),
    ],
    ids=["computes slowly", "loads slowly", "is as fast as the others"],
)
def test_f22_slow_rank_is_named_in_the_second_interval(two_ranks, computing, loading, said):
    first, second = two_ranks.run(compare_speeds, computing, loading, 10)
    assert first == second, "all ranks report the same"
    if said is None:
        assert first == []
    else:
        ((step, text),) = first
        assert step == 10
        assert text.startswith("rank 1 on ")
        assert said in text


def slow_down(rank: int) -> None:
    if rank == 1:

        def make(function: Any) -> Any:
            @functools.wraps(function)
            def slow(*arguments: Any, **options: Any) -> Any:
                time.sleep(0.01)
                return function(*arguments, **options)

            return slow

        replace("dynmoe.model.attention:Attention.forward", make)


def test_f22_straggler_is_logged_within_fifty_steps_and_not_killed(corpus_dir, tmp_path):
    process = TrainingProcess(
        corpus_dir, tmp_path / "runs", "guard.straggler_interval=10", "train.steps=24", prepare=slow_down
    )
    assert process.wait() == 0, process.output()
    run: Path = tmp_path / "runs" / "tiny"
    incidents = [entry for entry in read_rows(run / "incidents.jsonl") if entry["kind"] == "straggler"]
    assert incidents
    assert incidents[0]["step"] <= 50
    assert all(entry["text"].startswith("rank 1 on ") for entry in incidents)
    assert "warning: step 20: rank 1 on " in process.output()
