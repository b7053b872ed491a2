"""Experts per token in vLLM: the example of ``docs/serving.md``, and refused settings."""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path

import pytest

from tests.served.environments import python_of, variables
from tests.served.models import DYNAMIC, call_hf, train
from tests.snippets import blocks

pytestmark = pytest.mark.served


@pytest.fixture(scope="module")
def exported(corpus_dir, tmp_path_factory, away_from_the_hub) -> Path:
    folder = tmp_path_factory.mktemp("counts")
    train(corpus_dir, folder / "run", DYNAMIC["top_p"])
    call_hf("export", str(folder / "run"), str(folder / "out"))
    return folder


def run(folder: Path, script: str) -> subprocess.CompletedProcess[str]:
    (folder / "script.py").write_text(script)
    return subprocess.run(
        [python_of("vllm"), "script.py"], cwd=folder, text=True, capture_output=True, check=False, timeout=240,
        env=variables(folder),
    )  # fmt: skip


def script() -> str:
    (found,) = [snippet.text for snippet in blocks() if "expert_counts" in snippet.text]
    return found


def test_experts_are_counted(exported):
    done = run(exported, script())
    assert done.returncode == 0, done.stderr[-3000:]
    (counts,) = ast.literal_eval(next(line for line in done.stdout.splitlines() if line.startswith("[[[")))
    assert len(counts) == 3
    assert len({tokens for tokens, _ in counts}) == 1
    assert all(tokens < taken < 8 * tokens for tokens, taken in counts)


def test_experts_are_set(exported):
    text = script().replace('"count_experts": True', '"count_experts": True, "router_overrides": {"max_experts": 1}')
    done = run(exported, text)
    assert done.returncode == 0, done.stderr[-3000:]
    (counts,) = ast.literal_eval(next(line for line in done.stdout.splitlines() if line.startswith("[[[")))
    assert all(tokens == taken for tokens, taken in counts)


def test_a_setting_that_a_router_does_not_have_is_named(exported):
    done = run(exported, script().replace('"count_experts": True', '"router_overrides": {"k": 2}'))
    assert done.returncode != 0
    problem = "router_overrides.k=2: router.kind='top_p' has no such setting; use p or min_experts or max_experts"
    assert f"ValueError: {problem}" in done.stdout + done.stderr


def test_a_prompt_beyond_the_context_length_is_refused(exported):
    done = run(exported, script().replace('"def main("', '"def main(" * 100'))
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("vllm.exceptions")]
    assert "maximum context length is 64" in line
