"""What MXFP8 operands of the experts do to the loss, on this project's own source."""

from __future__ import annotations

from pathlib import Path
from statistics import mean

import pytest

from data_prep.build import build
from data_prep.recipe import Recipe
from harness.processes import ROOT, WarmTraining
from tests.train.cases import read_rows

FIELDS = [
    "data.sequence_length=128", "model.hidden=64", "model.heads=2", "model.kv_heads=1", "model.layers=2",
    "model.moe.experts=8", "model.moe.expert_hidden=64", "train.global_batch=8", "train.micro_batch=8",
    "train.steps=200", "train.precision=bf16", "optimizer.lr=3e-3", "schedule.warmup_steps=20", "eval.interval=0",
    "checkpoint.interval=200", "logging.interval=1", "eval.sample_tokens=0",
]  # fmt: skip


# With the seeds over which losses are averaged. A threshold amplifies any change of rounding by the routes that it
# flips: with top_p, fp32 instead of bf16 changes the loss of one seed by half a percent.
ROUTERS = {
    "top_k": (["model.router.kind=top_k", "model.router.k=2"], [0]),
    "top_p": (["model.router.kind=top_p", "model.router.p=0.4"], [0, 1, 2]),
}


def start(corpus: Path, runs: Path, backend: str, *fields: str) -> tuple[WarmTraining, Path]:
    """A training, and the file of its metrics."""
    own = [f"data.dirs=[{corpus}]", f"run.dir={runs}", f"run.name={backend}", f"train.moe_backend={backend}"]
    run = WarmTraining([*FIELDS, *fields, *own], 1, 0, runs.parent / f"{runs.name}-{backend}.txt", {})
    return run, runs / backend / "metrics.jsonl"


@pytest.mark.slow
@pytest.mark.parametrize("router", ROUTERS)
def test_after_200_steps_the_loss_is_that_of_bf16(tmp_path, summary, router):
    build(Recipe([str(ROOT / "dynmoe")], vocab_size=1000, validation_fraction=0.1), tmp_path / "corpus", workers=1)
    fields, seeds = ROUTERS[router]
    ends: dict[str, list[float]] = {"auto": [], "mxfp8_emulated": []}
    for seed in seeds:
        runs = tmp_path / f"seed-{seed}"
        started = {name: start(tmp_path / "corpus", runs, name, *fields, f"train.seed={seed}") for name in ends}
        for name, (run, metrics) in started.items():
            assert run.wait(600) == 0, run.output()
            losses = [row["train/lm_loss"] for row in read_rows(metrics)]
            assert len(losses) == 200
            assert losses[-1] < losses[0] - 2.0, "the model learned little: the comparison is weak"
            ends[name].append(mean(losses[-20:]))
    pairs = list(zip(ends["auto"], ends["mxfp8_emulated"], strict=True))
    shown = ", ".join(f"{bf16:.4f} and {mxfp8:.4f} ({mxfp8 / bf16:.4f})" for bf16, mxfp8 in pairs)
    ratio = sum(ends["mxfp8_emulated"]) / sum(ends["auto"])
    summary.append(f"{router}, loss of the last 20 of 200 steps, bf16 and MXFP8: {shown}; together {ratio:.4f}")
    assert all(bf16 != mxfp8 for bf16, mxfp8 in pairs)
    assert ratio == pytest.approx(1.0, rel=0.01)
