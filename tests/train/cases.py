"""Runs of train.py in separate processes, and functions for the ranks of a pool."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.processes import CPU, ROOT, Prepare, WarmTraining
from harness.runs import tensor_hashes, without_times

BLEND_VOCAB = 448


def tiny(corpus: Path, runs: Path) -> list[str]:
    """Fields of a tiny run of 40 steps on two expert-parallel ranks.

    With adaptation and a budget, since more state between steps means that a restart can lose more.
    """
    return [
        f"data.dirs=[{corpus}]", f"run.dir={runs}", "run.name=tiny", "data.sequence_length=32", "model.hidden=32",
        "model.heads=2", "model.kv_heads=1", "model.layers=2", "model.moe.experts=4", "model.moe.expert_hidden=32",
        "train.global_batch=4", "train.micro_batch=2", "train.steps=40", "parallel.expert=2",
        "schedule.warmup_steps=4", "logging.interval=1", "checkpoint.interval=10", "eval.interval=20",
        "eval.batches=2", "model.router.kind=top_any", "model.router.variant=improved", "model.router.min_experts=0",
        "model.router.initial_experts=1", "model.moe.active_at_start=2", "budget.method=loss_free",
        "budget.experts_per_token=1.5", "adaptation.interval=8", "adaptation.window=5",
        "adaptation.removal_share=0.8", "logging.histograms_every=4", "logging.trace_interval=8",
        "logging.table_every=20", "eval.sample_tokens=4",
    ]  # fmt: skip


class TrainingProcess(WarmTraining):
    """A tiny run on two ranks, which end with their launcher.

    Args:
        corpus: directory of a prepared corpus.
        runs: directory of run directories.
        overrides: further fields, after those of :func:`tiny`.
        ranks: number of ranks.
        restarts: number of restarts of failed ranks by the launcher.
        environment: additional environment variables.
        prepare: called with the rank in every rank before train.py.
    """

    def __init__(
        self, corpus: Path, runs: Path, *overrides: str, ranks: int = 2, restarts: int = 0,
        environment: Mapping[str, str] | None = None, prepare: Prepare | None = None,
    ) -> None:  # fmt: skip
        output = runs.parent / f"output-{time.monotonic_ns()}.txt"
        super().__init__([*tiny(corpus, runs), *overrides], ranks, restarts, output, environment or {}, prepare)

    def wait_for_row(self, metrics: Path, step: int, timeout_s: float = 120.0) -> None:
        """Waits until the row of ``step`` is written."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if any(row["train/step"] >= step for row in read_rows(metrics)):
                return
            assert self.poll() is None, self.output()
            time.sleep(0.005)
        raise TimeoutError(f"step {step} was not reached: {self.output()}")


def launch(corpus: Path, folder: Path, *fields: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs launch/torchrun.sh with the tiny run on two ranks; stdout includes stderr."""
    (folder / "tiny.yaml").write_text("{}\n")
    return subprocess.run(
        ["launch/torchrun.sh", str(folder / "tiny.yaml"), *tiny(corpus, folder / "runs"), *fields], cwd=ROOT,
        env=os.environ | CPU | {"NPROC_PER_NODE": "2", **environment}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, check=False, timeout=120,
    )  # fmt: skip


def evaluation_loss(run: Path, cache: Path) -> float:
    """Loss of the model that ``open_trained`` loads, on the validation samples of the run's last evaluation."""
    import torch

    from dynmoe.data.batches import PretrainingData
    from dynmoe.data.corpus import open_corpora
    from dynmoe.trained import open_trained

    model = open_trained(run, torch.device("cpu"))
    config = model.config
    length = config.data.sequence_length
    data = PretrainingData(open_corpora(config.data.dirs, length), config.data, 0, cache)
    samples = range(min(config.eval.batches * config.train.global_batch, data.validation_samples))
    assert len(samples) % 4 == 0, "not every layout evaluates all samples"
    with torch.no_grad():
        batches = [data.validation_batch(samples[start : start + 4]) for start in samples[::4]]
        losses = [model.decoder(batch.tokens_BS, batch.labels_BS, batch.start_BS) for batch in batches]
        return torch.stack(losses).mean().item()


def evaluate_blend(overrides: list[str], dirs: list[str], weights: list[float], cache: Path) -> list[dict[str, float]]:
    """Evaluations of an untrained model on all sequences of a blend, and on twelve of them."""
    import torch.distributed as dist

    from dynmoe.data.batches import PretrainingData
    from dynmoe.data.corpus import open_corpora
    from dynmoe.engines import make_engine
    from dynmoe.train.evaluation import Evaluation
    from tests.engines.cases import config_for

    rows = []
    for batches in (100, 3):
        config = config_for(
            "data.sequence_length=32", "train.global_batch=4", f"data.dirs=[{','.join(dirs)}]",
            f"data.weights={weights}", "eval.weighting=blend", f"eval.batches={batches}", *overrides,
        )  # fmt: skip
        config.check_world(dist.get_world_size())
        data = PretrainingData(open_corpora(dirs, 32), config.data, 0, cache)
        rows.append(Evaluation(config, make_engine(config, BLEND_VOCAB), data).row())
    return rows


def read_rows(metrics: Path) -> list[dict[str, Any]]:
    if not metrics.exists():
        return []
    rows = []
    for line in metrics.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:  # the last line may be truncated
            break
    return rows


def curve(metrics: Path) -> list[dict[str, str]]:
    """Rows without the metrics that depend on time; equal means bitwise equal."""
    return [without_times(row) for row in read_rows(metrics)]


def parameter_hashes(run: Path, step: int) -> dict[str, str]:
    """SHA-256 of the tensor files in the checkpoint of ``step``."""
    return tensor_hashes(run / "checkpoints" / f"step_{step:08d}")
