"""F21 and F22: a rank that hangs or goes another way ends the run with a report; one that is slow is named."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from bench.processes import CPU, ROOT
from dynmoe.config.guard import GuardConfig
from dynmoe.train.speed import SpeedComparison
from tests.faults.injection import replace
from tests.train.cases import TrainingProcess, read_rows

pytestmark = pytest.mark.alone

TIMEOUT_S = 3.0


def divert(rank: int, victim: int, place: str, call: int, way: str) -> None:
    """In the ``call``-th call of ``place`` one rank sleeps, or joins another collective than the others do."""

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
    "calls another collective": ("dynmoe.train.trainer:Trainer._agree", 7, "other"),
}


@pytest.mark.parametrize("hang", HANGS)
def test_f21_a_rank_that_hangs_ends_the_run_and_is_named(corpus_dir, tmp_path, hang):
    place, call, way = HANGS[hang]
    prepare = functools.partial(divert, victim=1, place=place, call=call, way=way)
    failures = tmp_path / "failures"
    process = TrainingProcess(
        corpus_dir, tmp_path / "runs", f"guard.hang_timeout_s={TIMEOUT_S}", prepare=prepare,
        environment={"DYNMOE_FAILURES": str(failures)},
    )  # fmt: skip
    run = tmp_path / "runs" / "tiny"
    process.wait_for_row(run / "metrics.jsonl", 6)
    start = time.monotonic()
    assert process.wait() != 0
    assert time.monotonic() - start < TIMEOUT_S + 20
    output = process.output()
    assert f"no progress for {TIMEOUT_S:g} s (guard.hang_timeout_s), in " in output
    waiting = [line for line in output.splitlines() if " waits in gloo:" in line]
    assert any("rank 0 on " in line for line in waiting)
    if way == "sleeps":
        assert "rank 1 on " in next(line for line in output.splitlines() if "waits for no other: it is at " in line)
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
    assert failure["text"].startswith("no progress for"), "what a launcher of ours shows"
    assert not failure["by_user"], "another start may do better"


@pytest.mark.slow  # a launcher gives a rank time before it kills it
def test_f21_a_rank_that_is_stopped_is_missed_and_goes_on_if_it_comes_back(corpus_dir, tmp_path, undisturbed):
    run = tmp_path / "runs" / "tiny"
    process = TrainingProcess(corpus_dir, tmp_path / "runs", f"guard.hang_timeout_s={TIMEOUT_S}")
    process.wait_for_row(run / "metrics.jsonl", 8)
    for pid in process.ranks():  # a laptop that sleeps: nobody's silence counts
        os.kill(pid, signal.SIGSTOP)
    time.sleep(TIMEOUT_S + 1)
    for pid in process.ranks():
        os.kill(pid, signal.SIGCONT)
    process.wait_for_row(run / "metrics.jsonl", 12)
    os.kill(process.ranks()[1], signal.SIGSTOP)
    assert process.wait() != 0
    assert "rank 1 reports nothing: it is stopped, gone, or not watched" in process.output()
    assert "rank 0 on " in process.output()


def test_f21_a_thread_that_keeps_the_interpreter_to_itself(tmp_path):
    """Then nothing of Python runs, the watchdog neither; the stacks are written all the same, and the rank ends."""
    script = """
import ctypes, sys
from pathlib import Path
from dynmoe.train import watchdog
watchdog._TIME_TO_REPORT_S = 0.5
dog = watchdog.Watchdog(Path(sys.argv[1]), 1.0)
import time; time.sleep(0.5); dog.progress("a step")
ctypes.PyDLL(None).usleep(60_000_000)
"""
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], env=os.environ | CPU, cwd=ROOT, capture_output=True, text=True,
        check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode != 0
    assert time.monotonic() - start < 40
    assert "Timeout" in done.stderr
    assert "File" in done.stderr


class Slow(nn.Module):
    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(self.seconds)
        return x


def compare_speeds(computing: list[float], loading: list[float], steps: int) -> list[tuple[int, str]]:
    """What each step of ranks with these seconds for a forward pass and for loading has to tell."""
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
def test_f22_a_slow_rank_is_named_in_the_second_interval(two_ranks, computing, loading, said):
    first, second = two_ranks.run(compare_speeds, computing, loading, 10)
    assert first == second, "every rank knows"
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


def test_f22_a_straggler_is_in_the_log_within_fifty_steps_and_lives(corpus_dir, tmp_path):
    process = TrainingProcess(corpus_dir, tmp_path / "runs", "guard.straggler_interval=10", prepare=slow_down)
    assert process.wait() == 0, process.output()
    run: Path = tmp_path / "runs" / "tiny"
    incidents = [entry for entry in read_rows(run / "incidents.jsonl") if entry["kind"] == "straggler"]
    assert incidents
    assert incidents[0]["step"] <= 50
    assert all(entry["text"].startswith("rank 1 on ") for entry in incidents)
    assert "warning: step 20: rank 1 on " in process.output()
