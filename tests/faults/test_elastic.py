"""F29: a run continues on another number of ranks, by the scripts in launch/."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.test_sample_order import samples
from tests.train.cases import TrainingProcess, launch, read_rows

# No adaptation, whose decisions may depend on rounding, and no balance loss, which depends on the number of
# micro-batches.
SMOOTH = ["adaptation.interval=0", "budget.method=none", "budget.experts_per_token=null", "model.router.balance_loss=0",
          "model.moe.active_at_start=null", "schedule.kind=constant", "eval.interval=0",
          "logging.trace_interval=1"]  # fmt: skip


def losses(run: Path) -> list[float]:
    """The loss of each step."""
    return [row["train/lm_loss"] for row in read_rows(run / "metrics.jsonl")]


@pytest.mark.slow
def test_f29_a_launch_continues_on_other_numbers_of_ranks(corpus_dir, tmp_path):
    """On two ranks, two of three, and four, which need a smaller micro-batch."""
    first = launch(corpus_dir, tmp_path, *SMOOTH, "train.steps=10")
    assert first.returncode == 0, first.stdout
    more = launch(corpus_dir, tmp_path, *SMOOTH, "train.steps=20", NPROC_PER_NODE="3")
    assert more.returncode == 0, more.stdout
    assert "tiny: continues on 2 of 3 rank(s): a step has 1 micro-batch(es) of 2, as parallel.expert=2: " in more.stdout
    last = launch(corpus_dir, tmp_path, *SMOOTH, NPROC_PER_NODE="4")
    assert last.returncode == 0, last.stdout
    assert "tiny: continues on 4 rank(s) (before: 2): a step has 1 micro-batch(es) of 1, as train.glob" in last.stdout

    whole = TrainingProcess(corpus_dir, tmp_path / "whole", *SMOOTH)
    assert whole.wait() == 0, whole.output()
    run = tmp_path / "runs" / "tiny"
    assert losses(run) == pytest.approx(losses(tmp_path / "whole" / "tiny"), rel=1e-5)
    assert samples(run) == samples(tmp_path / "whole" / "tiny")
    assert [row["ranks"] for row in read_rows(run / "logs" / "starts_node_0.jsonl")] == [2, 2, 4]

    (tmp_path / "other").mkdir()
    refused = launch(corpus_dir, tmp_path / "other", *SMOOTH, NPROC_PER_NODE="3")
    assert refused.returncode == 2
    assert "error: parallel.expert=2: must divide the world size (3)" in refused.stdout
