"""train.py with engine=megatron: files of a run, conversion to the other engine, loading, compaction."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

import dynmoe.convert
from dynmoe.compact import compact
from dynmoe.config import load_config
from dynmoe.convert import _write_in_host_memory, convert
from dynmoe.errors import UserError
from dynmoe.routers import ROUTERS
from dynmoe.train.checkpoint import latest_valid
from harness.processes import ROOT
from tests.engines.comparisons import read_canonical
from tests.train.cases import TrainingProcess, evaluation_loss, read_rows

PIPELINE = ["engine=megatron", "parallel.expert=1", "parallel.pipeline=2"]
STEPS = 12
# With adaptation and a budget; nothing that depends on the ranks of another engine.
RUN = [
    f"train.steps={STEPS}",
    "checkpoint.interval=4",
    "checkpoint.keep=3",
    "eval.interval=0",
    "schedule.kind=constant",
]


@pytest.fixture(scope="module")
def trained(corpus_dir, tmp_path_factory) -> Path:
    runs = tmp_path_factory.mktemp("megatron") / "runs"
    process = TrainingProcess(corpus_dir, runs, *PIPELINE, *RUN)
    assert process.wait() == 0, process.output()
    assert "(megatron, " in process.output()
    return runs / "tiny"


def test_a_run_writes_its_documented_files(trained):
    rows = read_rows(trained / "metrics.jsonl")
    assert [row["train/step"] for row in rows] == list(range(1, STEPS + 1))
    assert rows[-1]["train/lm_loss"] < rows[0]["train/lm_loss"]
    assert all(f"moe/layer_0{layer}/experts_per_token_mean" in rows[-1] for layer in (0, 1))
    events = read_rows(trained / "events.jsonl")
    assert {event["layer"] for event in events} == {0, 1}, "events of all stages are in one file"
    manifest = json.loads((trained / "checkpoints" / f"step_{STEPS:08d}" / "manifest.json").read_text())
    assert {"megatron/.metadata", "megatron/common.pt", "megatron/__0_0.distcp", "megatron/__1_0.distcp"} <= set(
        manifest["files"]
    )


@pytest.mark.slow  # tested without processes in test_parts
def test_other_engine_on_resume_is_refused_with_the_conversion_command(trained, corpus_dir):
    process = TrainingProcess(corpus_dir, trained.parent, *RUN, "parallel.expert=1")
    assert process.wait() != 0
    assert "engine='deepspeed': the run's checkpoint was saved by megatron" in process.output()
    assert "python -m dynmoe.convert" in process.output()


@pytest.mark.slow
def test_converted_run_resumes_like_an_uninterrupted_one(one_rank, trained, corpus_dir, tmp_path):
    """Eight steps of Megatron with pipelining, then four of DeepSpeed; the conversion back is bitwise identical."""
    early = tmp_path / "runs" / "early"
    (early / "checkpoints").mkdir(parents=True)
    (early / "config.yaml").write_text((trained / "config.yaml").read_text())
    os.symlink(trained / "checkpoints" / "step_00000008", early / "checkpoints" / "step_00000008")
    done = subprocess.run(
        [sys.executable, "-m", "dynmoe.convert", str(early), "--engine", "deepspeed", "--output",
         str(tmp_path / "runs" / "tiny")],
        capture_output=True, text=True, check=False, timeout=120, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "a deepspeed run with" in done.stdout
    process = TrainingProcess(corpus_dir, tmp_path / "runs", *RUN, "parallel.expert=1", ranks=1)
    assert process.wait() == 0, process.output()
    losses = {row["train/step"]: row["train/lm_loss"] for row in read_rows(trained / "metrics.jsonl")}
    after = read_rows(tmp_path / "runs" / "tiny" / "metrics.jsonl")
    assert [row["train/step"] for row in after] == [9, 10, 11, 12]
    for row in after:
        assert row["train/lm_loss"] == pytest.approx(losses[row["train/step"]], rel=1e-4)

    one_rank.run(convert, trained, tmp_path / "plain", "deepspeed")
    one_rank.run(convert, tmp_path / "plain", tmp_path / "back", "megatron")
    one_rank.run(convert, tmp_path / "back", tmp_path / "again", "deepspeed")
    first, second = (read_canonical(latest_valid(tmp_path / name / "checkpoints").path) for name in ("plain", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.slow
def test_with_a_gpu_the_whole_model_is_in_host_memory_all_the_same(one_rank, trained, tmp_path, monkeypatch):
    """Another process converts. It uses neither packages for GPUs nor the experts' backend of the run."""
    one_rank.run(convert, trained, tmp_path / "here", "deepspeed")
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("moe_backend: auto", "moe_backend: sonic"))
    for name in ("transformer_engine", "apex"):
        (tmp_path / "packages" / name).mkdir(parents=True)
        (tmp_path / "packages" / name / "__init__.py").write_text("raise RuntimeError('needs a GPU')")
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    convert(run, tmp_path / "there", "deepspeed")
    convert(tmp_path / "there", tmp_path / "back", "megatron")
    convert(tmp_path / "back", tmp_path / "again", "deepspeed")
    assert not torch.distributed.is_initialized(), "this process converted"
    here, there, again = (
        read_canonical(latest_valid(tmp_path / name / "checkpoints").path) for name in ("here", "there", "again")
    )
    for other in (there, again):
        assert here.keys() == other.keys()
        assert all(torch.equal(value, other[name]) for name, value in here.items())
    assert load_config(tmp_path / "again" / "config.yaml").train.moe_backend == "sonic"


@pytest.mark.parametrize(
    ("code", "error", "words"),
    [
        ("from dynmoe.cli import run_tool; from dynmoe.errors import UserError\n"
         "def fail(): raise UserError('a field: a cure')\nrun_tool(fail)", UserError, "^a field: a cure$"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", UserError, "was killed; free host memory"),
        ("import os; raise OSError('GPUs: ' + repr(os.environ['CUDA_VISIBLE_DEVICES']))", RuntimeError, "GPUs: ''"),
    ],
)  # fmt: skip
def test_failures_of_the_process_that_converts_are_reported(monkeypatch, code, error, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(dynmoe.convert, "_CHILD", code)
    with pytest.raises(error, match=words):
        _write_in_host_memory("deepspeed", "run", "source", "target")


def test_the_process_that_converts_knows_routers_of_ones_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(ROUTERS, "own", SimpleNamespace(__module__="a_module_of_mine"))
    with pytest.raises(RuntimeError, match="No module named 'a_module_of_mine'"):
        _write_in_host_memory("deepspeed", "run", "source", "target")


def test_the_process_that_converts_ends_with_its_parent():
    child = "import time, dynmoe.convert as own; own._write = lambda *names: time.sleep(600); own._serve()"
    code = (
        "import torch, dynmoe.convert as own\ntorch.cuda.is_available = lambda: True\n"
        f"own._CHILD = {child!r}\nown._write_in_host_memory('deepspeed', 'run', 'source', 'target')"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    end = time.monotonic() + 60
    while not (children := psutil.Process(parent.pid).children()) and time.monotonic() < end:
        time.sleep(0.1)
    parent.terminate()
    parent.wait()
    _, alive = psutil.wait_procs(children, timeout=60)
    assert len(children) == 1
    assert alive == []


def test_trained_model_loads_whole_in_one_process(one_rank, trained, tmp_path):
    """As for the token view."""
    outcome = json.loads((trained / "outcome.json").read_text())
    before = sorted(path.name for path in trained.iterdir())
    assert one_rank.run(evaluation_loss, trained, tmp_path)[0] == pytest.approx(outcome["eval/loss"], rel=1e-5)
    assert sorted(path.name for path in trained.iterdir()) == before, "temporary files were left behind"


def test_megatron_run_is_compacted(one_rank, trained, tmp_path):
    new, kept = one_rank.run(compact, trained, tmp_path / "small")[0]
    assert new.engine == "megatron"
    assert load_config(tmp_path / "small" / "config.yaml") == new
    assert new.parallel.pipeline == 2
    assert new.model.moe.experts_by_layer == [len(slots) for slots in kept.values()]
    assert min(new.model.moe.experts_by_layer) < 4
    assert [path.name for path in tmp_path.iterdir()] == ["small"], "temporary files were left behind"
    assert latest_valid(tmp_path / "small" / "checkpoints").step == STEPS
