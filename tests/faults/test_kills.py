"""F1 to F4 and F26: a run that is killed, stopped or has clock jumps gives the results of an undisturbed run."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

from dynmoe.train.checkpoint import find_corruption, step_directories
from harness.processes import is_running
from tests.faults.cases import MEGATRON, is_undisturbed
from tests.faults.injection import KillInTurn, Strike, replace
from tests.train.cases import TrainingProcess, read_rows

# Phases of a step; the calls lie between two checkpoints, ten steps apart, of a model with two layers.
STRIKES = {
    "deepspeed": (
        Strike("dynmoe.moe.layer:MoELayer.forward", 25, 1),
        Strike("dynmoe.ops.all_to_all:AllToAllGroup.start", 30, 0),
        Strike("dynmoe.ops.routed_experts:_RoutedExperts.backward", 20, 1),
        Strike("torch.optim:AdamW.step", 5, 0, after=True),
        Strike("dynmoe.data.batches:PretrainingData.train_batch", 7, 1),
        Strike("dynmoe.engines.deepspeed:DeepSpeedEngine.evaluate", 1, 0),
        Strike("dynmoe.train.record:RunRecord.add_row", 9, 0),
    ),
    "megatron": (
        Strike("dynmoe.moe.layer:MoELayer.forward", 25, 1),
        Strike("dynmoe.ops.routed_experts:_RoutedExperts.backward", 12, 0),
        Strike("torch.optim:AdamW.step", 5, 1, after=True),
        Strike("dynmoe.engines.megatron.engine:MegatronEngine.evaluate", 1, 1),
    ),
}


@pytest.mark.parametrize(
    ("engine", "numbers"),
    [
        ("deepspeed", (1, 3, 4)),
        pytest.param("deepspeed", range(7), marks=pytest.mark.slow),
        pytest.param("megatron", range(4), marks=pytest.mark.slow),
    ],
)
def test_f01_kill_of_a_rank_in_any_phase_of_a_step(
    undisturbed, undisturbed_pipeline, corpus_dir, tmp_path, engine, numbers
):
    kills = KillInTurn(tuple(STRIKES[engine][number] for number in numbers), tmp_path)
    overrides = MEGATRON if engine == "megatron" else []
    count = len(kills.strikes)
    process = TrainingProcess(corpus_dir, tmp_path / "runs", *overrides, restarts=count, prepare=kills)
    assert process.wait() == 0, process.output()
    assert kills.struck() == count, process.output()
    is_undisturbed(tmp_path / "runs" / "tiny", undisturbed_pipeline if engine == "megatron" else undisturbed[0])


# Before and after each part of a save: shard, hash, manifest, rename, verification, and (interrupted) removal of the
# oldest checkpoint.
SAVE = (
    Strike("dynmoe.engines.canonical_state:save_tensors", 1, 1),
    Strike("dynmoe.train.checkpoint_store:hashes", 1, 0),
    Strike("dynmoe.train.checkpoint_store:hashes", 1, 1, after=True),
    Strike("dynmoe.train.checkpoint_store:commit", 1, 0),
    Strike("dynmoe.train.checkpoint:write_atomically", 1, 0, after=True),
    Strike("dynmoe.train.checkpoint_store:commit", 1, 0, after=True),
    Strike("dynmoe.train.checkpoint_store:find_corrupt_file", 1, 1),
    Strike("dynmoe.train.checkpoint_store:remove", 1, 0),
    Strike("dynmoe.train.checkpoint:rmtree", 1, 0),
    Strike("dynmoe.train.checkpoint_store:remove", 1, 0, after=True),
)


class KillInSaves(KillInTurn):
    """Also checks before each attempt that every directory with the name of a checkpoint is valid."""

    def __call__(self, rank: int) -> None:
        if rank == 0:
            paths = step_directories(self.folder / "runs" / "tiny" / "checkpoints")
            assert all(find_corruption(path) is None for path in paths), "an incomplete checkpoint"
        super().__call__(rank)


def test_f02_kill_around_the_checkpoint_commit(undisturbed, corpus_dir, tmp_path):
    """Only kills right before and after the commit; the test with all phases is slow."""
    killed_in_saves((SAVE[3], SAVE[5]), undisturbed[0], corpus_dir, tmp_path, ["checkpoint.asynchronous=true"])


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", ["true", "false"])
@pytest.mark.parametrize("engine", ["deepspeed", "megatron"])
def test_f02_kill_in_any_phase_of_a_checkpoint_save(
    undisturbed, undisturbed_pipeline, corpus_dir, tmp_path, engine, asynchronous
):
    strikes = SAVE
    overrides = [f"checkpoint.asynchronous={asynchronous}"]
    reference = undisturbed[0]
    if engine == "megatron":
        place = "dynmoe.engines.megatron.checkpoint:FileSystemWriterAsync.write_preloaded_data"
        metadata = "dynmoe.engines.megatron.checkpoint:FileSystemWriterAsync.finish"
        strikes = (Strike(place, 1, 1), Strike(metadata, 1, 0), Strike(metadata, 1, 0, after=True), *SAVE[3:6])
        overrides += MEGATRON
        reference = undisturbed_pipeline
    killed_in_saves(strikes, reference, corpus_dir, tmp_path, overrides)


def killed_in_saves(
    strikes: tuple[Strike, ...], reference: Path, corpus_dir: Path, tmp_path: Path, overrides: list[str]
) -> None:
    kills = KillInSaves(strikes, tmp_path)
    fields = [*overrides, "checkpoint.interval=4"]
    process = TrainingProcess(corpus_dir, tmp_path / "runs", *fields, restarts=len(strikes), prepare=kills)
    assert process.wait() == 0, process.output()
    assert kills.struck() == len(strikes), process.output()
    run = tmp_path / "runs" / "tiny"
    is_undisturbed(run, reference)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step_00000036", "step_00000040"]


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["launcher", "tree"])
def test_f03_kill_of_the_launcher_or_of_all_processes(undisturbed, corpus_dir, tmp_path, victim):
    step = random.SystemRandom().randint(3, 37)
    process = TrainingProcess(corpus_dir, tmp_path / "runs")
    run = tmp_path / "runs" / "tiny"
    process.wait_for_row(run / "metrics.jsonl", step)
    ranks = process.kill_launcher() if victim == "launcher" else process.kill_tree()
    assert len(ranks) == 2
    deadline = time.monotonic() + 30
    while any(is_running(rank) for rank in ranks):
        assert time.monotonic() < deadline, "ranks outlived their launcher"
        time.sleep(0.05)
    again = TrainingProcess(corpus_dir, tmp_path / "runs")
    assert again.wait() == 0, f"killed after step {step}: {again.output()}"
    is_undisturbed(run, undisturbed[0])


def test_f04_sigterm_to_any_rank_at_any_time_saves_a_checkpoint(undisturbed, corpus_dir, tmp_path):
    """Signals all ranks, one rank, all ranks twice, and all ranks during a save; each next start resumes."""
    run = tmp_path / "runs" / "tiny"

    def all_ranks(process: TrainingProcess) -> None:
        process.signal(signal.SIGTERM)

    def one_rank(process: TrainingProcess) -> None:
        os.kill(process.ranks()[1], signal.SIGTERM)

    def twice(process: TrainingProcess) -> None:
        for pid in process.ranks() * 2:
            os.kill(pid, signal.SIGTERM)

    def while_saving(process: TrainingProcess) -> None:
        deadline = time.monotonic() + 60
        while not list((run / "checkpoints").glob("step_*.tmp-*")):
            assert time.monotonic() < deadline, process.output()
        all_ranks(process)

    reached = 0
    for tell, step in ((all_ranks, 4), (one_rank, 11), (twice, 18), (while_saving, 24)):
        process = TrainingProcess(corpus_dir, tmp_path / "runs", "checkpoint.interval=5")
        process.wait_for_row(run / "metrics.jsonl", step)
        tell(process)
        start = time.monotonic()
        process.wait()
        assert time.monotonic() - start < 10, "not within the grace period"
        outcome = json.loads((run / "outcome.json").read_text())
        assert outcome["status"] == "preempted", (tell.__name__, process.output())
        assert reached < outcome["step"] < 40, "the run made no progress, or finished"
        reached = outcome["step"]
        assert step_directories(run / "checkpoints")[0].name == f"step_{reached:08d}"
    assert TrainingProcess(corpus_dir, tmp_path / "runs", "checkpoint.interval=5").wait() == 0
    is_undisturbed(run, undisturbed[0])


def jumping_clock(rank: int) -> None:
    """Lets the wall clock jump by years in both directions at each call."""
    draw = random.Random(rank)
    now = time.time

    replace("time:time", lambda function: lambda: now() + draw.choice([-1, 1]) * draw.randint(0, 10**8))


@pytest.mark.slow
def test_f26_clock_jumps_do_not_affect_the_run(undisturbed, corpus_dir, tmp_path):
    run = tmp_path / "runs" / "tiny"
    kills = TrainingProcess(corpus_dir, tmp_path / "runs", prepare=jumping_clock)
    kills.wait_for_row(run / "metrics.jsonl", 25)
    kills.kill_tree()
    old = step_directories(run / "checkpoints")[-1]
    os.utime(old, (2e9, 2e9))  # the older checkpoint looks newer
    process = TrainingProcess(corpus_dir, tmp_path / "runs", prepare=jumping_clock)
    assert process.wait() == 0, process.output()
    is_undisturbed(run, undisturbed[0])
    rows = read_rows(run / "metrics.jsonl")
    assert all(0 < row["train/step_time_s"] < 60 for row in rows), "a timer uses the wall clock"
    clocks = [row["train/wall_clock_s"] for row in rows]
    assert clocks == sorted(clocks)
    assert 0 < clocks[-1] < 120
