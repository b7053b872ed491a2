"""Runs over packed documents that do not see each other."""

from __future__ import annotations

import pytest

from dynmoe.config import load_config
from tests.faults.cases import MEGATRON
from tests.train.cases import TrainingProcess, curve, parameter_hashes, read_rows

PACKED = [
    "data.packing=best_fit", "data.predict_first_token=false", "schedule.kind=constant", "logging.trace_interval=0",
    "eval.domains=true", "adaptation.interval=0",
]  # fmt: skip


@pytest.mark.parametrize("layout", [pytest.param([], id="EP 2"), pytest.param(MEGATRON, id="PP 2")])
def test_a_packed_run_resumes_bitwise_and_its_losses_agree(corpus_dir, tmp_path, layout):
    runs = {}
    for name, ends in {"whole": [12], "parts": [5, 12]}.items():
        for end in ends:
            process = TrainingProcess(corpus_dir, tmp_path / name, *PACKED, *layout, f"train.steps={end}")
            assert process.wait() == 0, process.output()
        runs[name] = tmp_path / name / "tiny"
    whole, parts = (curve(run / "metrics.jsonl") for run in runs.values())
    # The first part ends with an evaluation.
    assert [row["train/lm_loss"] for row in whole] == [row["train/lm_loss"] for row in parts]
    assert whole[-1] == parts[-1]
    assert parameter_hashes(runs["whole"], 12) == parameter_hashes(runs["parts"], 12)
    last = read_rows(runs["whole"] / "metrics.jsonl")[-1]
    (by_domain,) = (value for name, value in last.items() if name.startswith("eval/domains/") and name.endswith("loss"))
    # One by masks, the other by passages: of all validation text, or of as much.
    assert last["eval/loss"] == pytest.approx(by_domain, rel=1e-5)
    assert load_config(runs["whole"] / "config.yaml").data.documents == "masked"
