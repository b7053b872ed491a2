"""The standalone examples work; examples of an engine or of traces are tested next to those."""

from __future__ import annotations

import json
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
def test_a_vision_language_model_answers_questions_in_three_stages(tmp_path):
    """Short settings: the encoder is trained in full, the language model far enough to see one kind of answer."""
    page = tmp_path / "view" / "tokens.html"
    said = run_example(
        "examples/vision_language.py", "--compare", "--scenes", "3000", "--steps", "400", "40", "20", "250", "60",
        "--output", str(page), timeout_s=1800,
    )  # fmt: skip
    assert float(re.search(r"known pairs, ([\d.]+) of unseen pairs", said)[1]) > 0.8
    stages = dict(re.findall(r"(Stage \d, [^:]+): .*\(colour ([\d.]+),", said))
    assert list(stages) == ["Stage 1, the projector", "Stage 2, dense", "Stage 3, top-any", "Stage 3, top-2"]
    assert float(stages["Stage 1, the projector"]) < 0.5
    assert float(stages["Stage 2, dense"]) > 0.5
    assert float(stages["Stage 3, top-any"]) > 0.6
    ratio = float(re.search(r"^\| 0 \|.*\| ([\d.]+) \|$", said, re.MULTILINE)[1])
    assert ratio == pytest.approx(1.0, abs=0.01)
    view = json.loads(page.with_suffix(".json").read_text())
    kinds = {row["name"]: row["count"] for row in view["tables"]["kinds"]}
    assert kinds["image"] == sum(image["rows"] * image["columns"] for image in view["images"]) > 0
    assert kinds["text"] > 0
    assert len({len(experts) for token in view["tokens"] for experts in token["experts"]}) > 1


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
