"""The exported quickstart model in an environment with transformers and torch, but without this project."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from harness.processes import CPU, ROOT
from tests.hf.test_export import USE

TASK = Path("configs") / "tasks" / "python_idioms.yaml"


def call(*command: str | Path, cwd: Path = ROOT, timeout_s: float = 600) -> str:
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, check=False, text=True, capture_output=True, timeout=timeout_s,
        env=os.environ | CPU | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, f"{command}: {done.stdout[-2000:]} {done.stderr[-3000:]}"
    return done.stdout


@pytest.mark.slow
def test_the_exported_quickstart_model_generates_learns_and_is_evaluated(tmp_path):
    corpus = tmp_path / "stdlib"
    out = tmp_path / "out"
    call(sys.executable, "-m", "data_prep", "stdlib", "--out", corpus, "--validation-fraction", "0.05")
    fields = [f"data.dirs=[{corpus}]", f"run.dir={tmp_path}", "run.name=run", "logging.wandb=disabled"]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint",
                "127.0.0.1:0"]  # fmt: skip
    call(sys.executable, *launcher, "train.py", "configs/quickstart.yaml", *fields, timeout_s=1200)
    call(sys.executable, "-m", "dynmoe.hf", "export", tmp_path / "run", out)
    ours = call(sys.executable, "-m", "dynmoe.evaluate", tmp_path / "run", "--tasks", TASK, "--no-domains",
                "--output", tmp_path / "ours.json")  # fmt: skip
    assert "tasks/python_idioms" in ours

    bin_ = tmp_path / "venv" / "bin"
    call(sys.executable, "-m", "venv", tmp_path / "venv")
    pinned = [f"{name}=={version(name).split('+')[0]}" for name in ("torch", "transformers", "accelerate", "lm-eval")]
    call(bin_ / "pip", "install", "--quiet", pinned[0])
    call(bin_ / "pip", "install", "--quiet", *pinned)
    absent = "import importlib.util as u; print([n for n in ('dynmoe', 'deepspeed', 'megatron') if u.find_spec(n)])"
    assert call(bin_ / "python", "-c", absent, cwd=tmp_path) == "[]\n"

    printed = call(bin_ / "python", USE, out, tmp_path / "tuned", cwd=tmp_path)
    before, after, experts = json.loads(printed.splitlines()[-1])
    assert after < before - 0.5
    assert 1 < experts < 16
    shutil.copytree(ROOT / TASK.parent, tmp_path / TASK.parent)
    arguments = f"pretrained={out},trust_remote_code=True,dtype=float32"
    call(bin_ / "lm_eval", "--model", "hf", "--model_args", arguments, "--tasks", TASK, "--device", "cpu",
         "--output_path", tmp_path / "theirs", cwd=tmp_path)  # fmt: skip
    (report,) = (tmp_path / "theirs").rglob("results_*.json")
    theirs = json.loads(report.read_text())["results"]["python_idioms"]
    scores = json.loads((tmp_path / "ours.json").read_text())["scores"]
    for metric in ("acc", "acc_norm"):
        assert theirs[f"{metric},none"] == scores[f"eval/tasks/python_idioms/{metric}"]
    assert theirs["acc,none"] > 0.35, "chance level is 0.25"
