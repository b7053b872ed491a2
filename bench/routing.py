"""Does dynamic routing pay? The quickstart model with each router, same tokens and seeds: loss, K and FLOPs."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dynmoe.config import load_config
from dynmoe.errors import UserError

_HELD = ["budget.experts_per_token=2"]
_TOP_ANY = "model.router.kind=top_any"
METHODS = {
    "top_k 2": ["model.router.kind=top_k", "model.router.k=2"],
    "top_p 0.4": ["model.router.kind=top_p", "model.router.p=0.4"],
    "top_p held at 2": ["model.router.kind=top_p", "model.router.p=0.15", "budget.method=pi", *_HELD],
    "top_any released": [_TOP_ANY, "model.router.variant=released"],
    "top_any improved, held at 2": [_TOP_ANY, "model.router.variant=improved", "budget.method=loss_free", *_HELD],
    # Not part of the default comparison.
    "top_k 2, loss-free": [
        "model.router.kind=top_k", "model.router.k=2", "model.router.balance_loss=0", "budget.method=loss_free",
    ],
    "top_p improved, held at 2": [
        "model.router.kind=top_p", "model.router.variant=improved", "model.router.p=0.15", "budget.method=pi", *_HELD,
    ],
    "sigmoid, held at 2": [
        "model.router.kind=sigmoid", "model.router.initial_experts=2", "budget.method=loss_free", *_HELD,
    ],
    "expert_threshold 2": ["model.router.kind=expert_threshold", *_HELD],
    "relu 2": ["model.router.kind=relu", *_HELD],
    "null_experts 4 of 32": ["model.router.kind=null_experts", "model.router.k=4", "model.router.num_null=16"],
}  # fmt: skip
DEFAULT = list(METHODS)[:5]
_SETTLED_STEPS = 50


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, default=Path("configs/quickstart.yaml"), help="model and data")
    parser.add_argument("--methods", nargs="+", default=DEFAULT, choices=METHODS, metavar="METHOD",
                        help=f"methods to compare: {'; '.join(METHODS)}")  # fmt: skip
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method")
    parser.add_argument("--steps", type=int, default=160, help="optimizer steps per run")
    parser.add_argument("--workers", type=int, default=2, help="concurrent runs, each on one core or GPU")
    parser.add_argument("--runs", type=Path, default=Path("runs/bench-routing"), help="directory of the runs; finished "
                        "runs are not repeated, so use a new one after a change of the code")  # fmt: skip
    parser.add_argument(
        "--overrides", nargs="*", default=[], metavar="key=value", help="fields to override in every run"
    )
    parser.add_argument("--plot", type=Path, help="file for a plot of loss and K over training (needs matplotlib)")


def run(given: argparse.Namespace) -> list[dict[str, Any]]:
    jobs = [(method, seed) for seed in range(given.seeds) for method in given.methods]
    with ThreadPoolExecutor(given.workers) as pool:
        list(pool.map(lambda job: _train(given, *job), jobs))
    runs = {job: _figures(given, *job) for job in jobs}
    if given.plot is not None:
        _draw(given, given.plot)
    return list(_rows(given, runs))


def _directory(given: argparse.Namespace, method: str, seed: int) -> Path:
    name = "".join(letter if letter.isalnum() else "-" for letter in method)
    return given.runs / f"{name}-{given.steps}-seed{seed}"


def _train(given: argparse.Namespace, method: str, seed: int) -> None:
    """Trains in its own process unless the run is finished."""
    directory = _directory(given, method, seed)
    overrides = [
        f"run.dir={directory.parent}", f"run.name={directory.name}", f"train.steps={given.steps}",
        f"train.seed={seed}", "parallel.expert=1", "logging.interval=1", "logging.wandb=disabled", "eval.interval=0",
        "checkpoint.interval=0", *METHODS[method], *given.overrides,
    ]  # fmt: skip
    outcome = directory / "outcome.json"
    if outcome.exists() and json.loads(outcome.read_text())["status"] == "finished":
        if load_config(directory / "config.yaml") != load_config(given.config, overrides):
            raise UserError(f"--runs: {directory} was trained with a different configuration; use another directory")
        return
    command = [sys.executable, "train.py", str(given.config), *overrides]
    alone = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run(
        command, env=alone | {"OMP_NUM_THREADS": "1"}, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        check=False,
    )  # fmt: skip
    if done.returncode:
        last = (done.stdout.strip().splitlines() or ["no output"])[-1]
        raise UserError(f"{method}, seed {seed}: {last.removeprefix('error: ')}")
    print(f"{method}, seed {seed}: done", flush=True)


def _metrics(given: argparse.Namespace, method: str, seed: int) -> list[dict[str, float]]:
    lines = (_directory(given, method, seed) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def _figures(given: argparse.Namespace, method: str, seed: int) -> dict[str, Any]:
    rows = _metrics(given, method, seed)
    settled = rows[-_SETTLED_STEPS:]
    layers = sorted({name.split("/")[1] for name in rows[0] if name.startswith("moe/layer_")})
    name = "experts_per_token_mean"
    return {
        "loss": rows[-1]["eval/loss"],
        "mean_k": statistics.mean(row[f"moe/{name}"] for row in rows),
        "end_k": statistics.mean(row[f"moe/{name}"] for row in settled),
        "flops": rows[-1]["train/cumulative_flops"],
        "by_layer": [statistics.mean(row[f"moe/{layer}/{name}"] for row in settled) for layer in layers],
    }


def _rows(given: argparse.Namespace, runs: dict[tuple[str, int], dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """A row for each method: means over seeds, and differences to the first method for each seed."""
    first = given.methods[0]
    for method in given.methods:
        own = [runs[method, seed] for seed in range(given.seeds)]
        difference = [figures["loss"] - runs[first, seed]["loss"] for seed, figures in enumerate(own)]
        means = {name: statistics.mean(figures[name] for figures in own) for name in ("mean_k", "end_k", "flops")}
        by_layer = [statistics.mean(values) for values in zip(*(figures["by_layer"] for figures in own), strict=True)]
        yield {
            "benchmark": "routing",
            "method": method,
            "validation_loss": statistics.mean(figures["loss"] for figures in own),
            "deviation": _deviation([figures["loss"] for figures in own]),
            f"minus_{first.replace(' ', '_')}": statistics.mean(difference),
            "deviation_of_that": _deviation(difference),
            "mean_k_of_training": means["mean_k"],
            f"mean_k_of_last_{_SETTLED_STEPS}": means["end_k"],
            "petaflops": means["flops"] / 1e15,
            "k_by_layer_at_end": " ".join(f"{k:.2f}" for k in by_layer),
            "seeds": given.seeds,
            "steps": given.steps,
        }


def _deviation(values: list[float]) -> float | None:
    """Standard deviation; None for a single sample."""
    return statistics.stdev(values) if len(values) > 1 else None


def _draw(given: argparse.Namespace, path: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        raise UserError("--plot: matplotlib is not installed; run pip install 'dynmoe[dev]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    for method in given.methods:
        runs = [_metrics(given, method, seed) for seed in range(given.seeds)]
        tokens = [row["train/tokens"] / 1e6 for row in runs[0]]
        flops = [statistics.mean(rows[i]["train/cumulative_flops"] for rows in runs) / 1e15 for i in range(len(tokens))]
        loss = _smooth([statistics.mean(rows[i]["train/lm_loss"] for rows in runs) for i in range(len(tokens))])
        k = [statistics.mean(rows[i]["moe/experts_per_token_mean"] for rows in runs) for i in range(len(tokens))]
        axes[0].plot(tokens, loss, label=method)
        axes[1].plot(flops, loss, label=method)
        axes[2].plot(tokens, k, label=method)
    labels = [
        ("million tokens", "training loss (nats)"), ("activated PFLOP", "training loss (nats)"),
        ("million tokens", "experts per token"),
    ]  # fmt: skip
    for axis, (x_label, y_label) in zip(axes, labels, strict=True):
        axis.set(xlabel=x_label, ylabel=y_label)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(path)


def _smooth(values: list[float], width: int = 10) -> list[float]:
    """Moving average over the last ``width`` values."""
    return [statistics.mean(values[max(0, i - width + 1) : i + 1]) for i in range(len(values))]
