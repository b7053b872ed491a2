"""A run that is killed, stopped or corrupted resumes bitwise identically to an undisturbed run."""

from __future__ import annotations

import json
import shutil

import pandas as pd
import pytest

from harness.processes import WarmTraining
from tests.train.cases import TrainingProcess, curve, read_rows


def test_a_run_writes_its_documented_files(undisturbed):
    run, output = undisturbed
    rows = read_rows(run / "metrics.jsonl")
    assert [row["train/step"] for row in rows] == list(range(1, 41))
    assert rows[-1]["train/lm_loss"] < rows[0]["train/lm_loss"] - 0.1
    assert [row["train/step"] for row in rows if "eval/loss" in row] == [20, 40]
    assert rows[-1]["train/tokens"] == 40 * 4 * 32
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step_00000030", "step_00000040"]
    events = read_rows(run / "events.jsonl")
    assert {event["change"] for event in events} == {"added", "removed"}
    assert all(event["step"] % 8 == 0 and event["rank"] == event["expert"] // 2 for event in events)
    outcome = json.loads((run / "outcome.json").read_text())
    assert (outcome["status"], outcome["step"]) == ("finished", 40)
    for part in ("Validation loss", "token frequencies alone would give", "Experts per token", str(run)):
        assert part in output
    assert "Training in fp32 on cpu; experts are computed by the grouped_mm backend." in output
    # In each of two layers at most: 32 fp32 numbers there and back, both ways, and two routes with their gradients.
    assert all(0 < row["moe/all_to_all_bytes_per_token"] < 2 * (4 * 32 * 4 + 2 * 12) + 1 for row in rows)
    assert "model:" in (run / "config.yaml").read_text()
    assert [row["train/step"] for row in read_rows(run / "histograms.jsonl")] == list(range(4, 41, 4))
    # Both ranks, five traced steps of two layers.
    traces = pd.read_parquet(run / "traces")
    assert len(traces) == 5 * 2 * 4 * 32
    assert len(list((run / "traces" / "step_00000008").iterdir())) == 2
    table = output[output.index("layer  experts/token") :].splitlines()
    assert [line.split()[0] for line in table[:3]] == ["layer", "0", "1"]


def test_a_finished_run_prints_its_summary_when_started_again(undisturbed, corpus_dir):
    run, _ = undisturbed
    before = (run / "metrics.jsonl").read_bytes()
    process = TrainingProcess(corpus_dir, run.parent)
    assert process.wait() == 0, process.output()
    for part in ("Validation loss", "Experts per token at the end", "token frequencies alone"):
        assert part in process.output()
    assert json.loads((run / "outcome.json").read_text())["eval/loss"] > 0
    assert (run / "metrics.jsonl").read_bytes() == before


def test_run_resumes_from_a_config_yaml_with_an_old_field_name(undisturbed, tmp_path):
    run = tmp_path / "tiny"
    shutil.copytree(undisturbed[0], run)
    config = run / "config.yaml"
    text = config.read_text()
    assert text.count("max_consecutive_nonfinite_steps: 3") == 1
    config.write_text(text.replace("max_consecutive_nonfinite_steps: 3", "bad_steps: 3"))
    process = WarmTraining([str(config), f"run.dir={tmp_path}", "train.steps=42"], 2, 0, tmp_path / "output.txt", {})
    assert process.wait() == 0, process.output()
    assert process.output().count("guard.bad_steps is now called guard.max_consecutive_nonfinite_steps") == 1
    assert [row["train/step"] for row in read_rows(run / "metrics.jsonl")] == list(range(1, 43))
    assert config.read_text() == text.replace(f"dir: {undisturbed[0].parent}", f"dir: {tmp_path}").replace(
        "steps: 40", "steps: 42"
    )


def test_a_finished_run_says_that_there_is_nothing_to_train(undisturbed, tmp_path):
    run = tmp_path / "tiny"
    shutil.copytree(undisturbed[0], run)
    process = WarmTraining([str(run / "config.yaml"), f"run.dir={tmp_path}"], 2, 0, tmp_path / "output.txt", {})
    assert process.wait() == 0, process.output()
    words = f"{run}: step 40 of train.steps=40 was reached before; for another training, set run.name or more steps"
    assert process.output().count(words) == 1
    assert len(read_rows(run / "metrics.jsonl")) == 40


@pytest.mark.slow  # which one is chosen: tests/faults/test_checkpoints.py
def test_a_corrupt_checkpoint_is_quarantined_and_the_previous_one_loads(undisturbed, corpus_dir, tmp_path):
    run = tmp_path / "runs" / "tiny"
    shutil.copytree(undisturbed[0], run)
    shard = run / "checkpoints" / "step_00000040" / "experts_00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    again = TrainingProcess(corpus_dir, tmp_path / "runs", "train.steps=42")
    assert again.wait() == 0, again.output()
    assert "experts_00001.safetensors is damaged: its SHA-256 is not the manifest's; quarantined" in again.output()
    rows = read_rows(run / "metrics.jsonl")
    assert [row["train/step"] for row in rows] == list(range(1, 43))
    assert curve(run / "metrics.jsonl")[:30] == curve(undisturbed[0] / "metrics.jsonl")[:30]


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["model.router.p=2"], "model.router.p=2"),
        (["data.dirs=[nowhere]"], "nowhere holds no prepared corpus"),
        (["parallel.expert=4", "model.moe.experts=4"], "parallel.expert=4"),
        pytest.param(["run.dir=/proc/none"], "/proc/none", marks=pytest.mark.slow),
        pytest.param(
            ["train.micro_batch=512", "train.global_batch=1024"],
            "fewer than one forward pass on all ranks (1024)",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_train_refuses_invalid_input_in_one_line(corpus_dir, tmp_path, overrides, named):
    process = TrainingProcess(corpus_dir, tmp_path / "runs", *overrides)
    assert process.wait() != 0
    lines = [line for line in process.output().splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, process.output()
    assert named in lines[0]


def test_a_corpus_with_flipped_tokens_is_refused_before_the_first_step(corpus_dir, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(corpus_dir, damaged)
    content = bytearray((damaged / "train.bin").read_bytes())
    content[200] ^= 1
    (damaged / "train.bin").write_bytes(content)
    process = TrainingProcess(damaged, tmp_path / "runs")
    assert process.wait() != 0
    assert "train.bin is damaged: its SHA-256 is not the manifest's" in process.output()
    assert not read_rows(tmp_path / "runs" / "tiny" / "metrics.jsonl")
