"""The standalone examples work; examples of an engine or of traces are tested next to those."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from harness.processes import CPU, ROOT


def run_example(*command: str, timeout_s: float, cwd: Path = ROOT) -> str:
    done = subprocess.run(
        [sys.executable, *command], cwd=cwd, check=False, text=True, capture_output=True, timeout=timeout_s,
        env=os.environ | CPU | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_our_layer_in_a_plain_model():
    said = run_example("examples/your_own_layer.py", timeout_s=120)
    losses = [float(value) for value in re.findall(r"loss ([\d.]+)", said)]
    experts = [float(value) for value in re.findall(r"([\d.]+) experts per token", said)]
    assert losses[-1] < losses[0] / 5
    assert all(1 < count < 8 for count in experts)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_vision_model_reads_digits_while_experts_are_added_and_removed(ranks):
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--rdzv-backend", "c10d",
                "--rdzv-endpoint", "127.0.0.1:0"] if ranks > 1 else []  # fmt: skip
    said = run_example(*launcher, "examples/vit_digits.py", timeout_s=600)
    accuracy = re.search(r"test accuracy ([\d.]+) on 360 unseen digits", said)
    assert accuracy is not None, said
    assert float(accuracy[1]) >= 0.97
    in_use = re.findall(r"in use (\[.*\])", said)
    assert in_use[0] != in_use[-1], "no expert was added or removed"


@pytest.mark.slow
def test_exported_models_learn_to_classify(tmp_path):
    """Runs in its own folder, where it creates models."""
    for name in ("train.py", "configs", "dynmoe", "data_prep"):
        (tmp_path / name).symlink_to(ROOT / name)
    said = run_example(str(ROOT / "examples" / "finetune_classification.py"), cwd=tmp_path, timeout_s=1200)
    commonest = float(re.search(r"([\d.]+) of them of one package", said)[1])
    found = re.findall(
        r"(\S+)_exported: .* accuracy ([\d.]+), ([\d.]+) experts.* below ([\d.]+), .* above ([\d.]+)\)", said
    )
    assert [name for name, *_ in found] == ["top_k_1", "top_k_2", "top_any"]
    assert all(float(accuracy) > commonest + 0.2 for _, accuracy, *_ in found)
    for (_, _, *experts), k in zip(found, (1, 2), strict=False):
        assert [float(value) for value in experts] == [k] * 3
    mean, low, high = (float(value) for value in found[-1][2:])
    assert 1 <= low < mean < high <= 8
