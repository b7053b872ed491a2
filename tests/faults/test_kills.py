"""F1 to F4, F26: killed, told to end or with a clock that jumps, a run has the curve of an undisturbed one."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

from bench.processes import is_running
from dynmoe.train.checkpoint import problem_of, step_directories
from tests.faults.cases import MEGATRON, is_undisturbed
from tests.faults.injection import KillInTurn, Strike, replace
from tests.train.cases import TrainingProcess, read_rows

# Phases of a step, and calls of two layers or one that come between two checkpoints, of ten steps.
STRIKES = {
    "deepspeed": (
        Strike("dynmoe.moe.layer:MoELayer.forward", 25, 1),
        Strike("dynmoe.ops.all_to_all:Wire.start", 30, 0),
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
def test_f01_a_rank_killed_in_any_phase_of_a_step(
    undisturbed, undisturbed_pipeline, corpus_dir, tmp_path, engine, numbers
):
    kills = KillInTurn(tuple(STRIKES[engine][number] for number in numbers), tmp_path)
    overrides = MEGATRON if engine == "megatron" else []
    count = len(kills.strikes)
    process = TrainingProcess(corpus_dir, tmp_path / "runs", *overrides, restarts=count, prepare=kills)
    assert process.wait() == 0, process.output()
    assert kills.struck() == count, process.output()
    is_undisturbed(tmp_path / "runs" / "tiny", undisturbed_pipeline if engine == "megatron" else undisturbed[0])


# Before and after each part of a save: the shard, its hash, the manifest, the rename, the look at what is there, and
# the removal of the oldest, of which half is left.
SAVE = (
    Strike("dynmoe.engines.plain_state:save_file", 1, 1),
    Strike("dynmoe.train.checkpoint_store:hashes", 1, 0),
    Strike("dynmoe.train.checkpoint_store:hashes", 1, 1, after=True),
    Strike("dynmoe.train.checkpoint_store:commit", 1, 0),
    Strike("dynmoe.train.checkpoint:write_atomically", 1, 0, after=True),
    Strike("dynmoe.train.checkpoint_store:commit", 1, 0, after=True),
    Strike("dynmoe.train.checkpoint_store:problem_of_files", 1, 1),
    Strike("dynmoe.train.checkpoint_store:remove", 1, 0),
    Strike("dynmoe.train.checkpoint:rmtree", 1, 0),
    Strike("dynmoe.train.checkpoint_store:remove", 1, 0, after=True),
)


class KillInSaves(KillInTurn):
    """Looks, before each attempt, at what the last one left: what is named like a checkpoint must be one."""

    def __call__(self, rank: int) -> None:
        if rank == 0:
            paths = step_directories(self.folder / "runs" / "tiny" / "checkpoints")
            assert all(problem_of(path) is None for path in paths), "half a checkpoint"
        super().__call__(rank)


def test_f02_a_rank_killed_around_the_commit_of_a_save(undisturbed, corpus_dir, tmp_path):
    """The strikes between which a save begins to count; all others are slow."""
    killed_in_saves((SAVE[3], SAVE[5]), undisturbed[0], corpus_dir, tmp_path, ["checkpoint.asynchronous=true"])


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", ["true", "false"])
@pytest.mark.parametrize("engine", ["deepspeed", "megatron"])
def test_f02_a_rank_killed_in_any_phase_of_a_save(
    undisturbed, undisturbed_pipeline, corpus_dir, tmp_path, engine, asynchronous
):
    strikes, overrides, reference = SAVE, [f"checkpoint.asynchronous={asynchronous}"], undisturbed[0]
    if engine == "megatron":
        place = "dynmoe.engines.megatron.checkpoint:FileSystemWriterAsync.write_preloaded_data"
        metadata = "dynmoe.engines.megatron.checkpoint:FileSystemWriterAsync.finish"
        strikes = (Strike(place, 1, 1), Strike(metadata, 1, 0), Strike(metadata, 1, 0, after=True), *SAVE[3:6])
        overrides, reference = [*overrides, *MEGATRON], undisturbed_pipeline
    killed_in_saves(strikes, reference, corpus_dir, tmp_path, overrides)


def killed_in_saves(
    strikes: tuple[Strike, ...], reference: Path, corpus_dir: Path, tmp_path: Path, overrides: list[str]
) -> None:
    kills, overrides = KillInSaves(strikes, tmp_path), [*overrides, "checkpoint.interval=4"]
    process = TrainingProcess(corpus_dir, tmp_path / "runs", *overrides, restarts=len(strikes), prepare=kills)
    assert process.wait() == 0, process.output()
    assert kills.struck() == len(strikes), process.output()
    run = tmp_path / "runs" / "tiny"
    is_undisturbed(run, reference)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step_00000036", "step_00000040"]


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["launcher", "tree"])
def test_f03_a_launcher_or_the_whole_tree_killed(undisturbed, corpus_dir, tmp_path, victim):
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


def test_f04_told_to_end_a_run_saves_whoever_is_told_and_when(undisturbed, corpus_dir, tmp_path):
    """All ranks; one of them; twice; in the middle of a save: each time the next start goes on."""
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
        assert reached < outcome["step"] < 40, "nothing was done, or all"
        reached = outcome["step"]
        assert step_directories(run / "checkpoints")[0].name == f"step_{reached:08d}"
    assert TrainingProcess(corpus_dir, tmp_path / "runs", "checkpoint.interval=5").wait() == 0
    is_undisturbed(run, undisturbed[0])


def jumping_clock(rank: int) -> None:
    """The time of day jumps by years, back and forth, from one look to the next."""
    draw, now = random.Random(rank), time.time

    replace("time:time", lambda function: lambda: now() + draw.choice([-1, 1]) * draw.randint(0, 10**8))


@pytest.mark.slow
def test_f26_a_clock_that_jumps_changes_nothing(undisturbed, corpus_dir, tmp_path):
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
    assert all(0 < row["train/step_time_s"] < 60 for row in rows), "a timer follows the clock"
    clocks = [row["train/wall_clock_s"] for row in rows]
    assert clocks == sorted(clocks)
    assert 0 < clocks[-1] < 120
