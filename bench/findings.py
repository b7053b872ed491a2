"""Do the findings of "Harder Tasks Need More Experts" (arXiv 2403.07652) show? K by time, layer and token, over seeds.

The paper reports for top-p routing that the mean number of experts per token falls during training, that lower layers
use more experts than upper ones, and that harder text uses more. Each seed trains one model (`--hours`; a training that
is stopped goes on with the next call) and is then read once: its metrics, and its checkpoint over validation text. What
was read of a seed is one JSON file below `--evidence`. Statistics are computed for each seed; their mean over seeds has
a 95 % interval as in `python -m bench routing`, and the verdict follows from it.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import stats

from bench.report import replace_block, shown
from bench.routing.intervals import Interval, interval_of
from bench.routing.methods import METHODS
from dynmoe.data.batches import PretrainingData
from dynmoe.data.corpus import Corpus
from dynmoe.errors import UserError
from dynmoe.moe.layer import capture_plans
from dynmoe.trained import TrainedModel, open_trained

_CONFIG = Path("configs/quickstart.yaml")
_METHOD = "top-p 0.4, paper"
_PARTS = 40
_BINS = 10
# Means of token ids that occur less often in the text read are too noisy to take them off.
_FEW = 10

# Statistic, what it is, and on which side of 0 the paper's finding lies.
STATISTICS: dict[str, tuple[str, int]] = {
    "change": ("K in the last tenth of the training minus K in the second tenth", -1),
    "first_minus_last_layer": ("K of the first layer minus K of the last layer, last tenth of the training", +1),
    "loss": ("rank correlation of K and the loss of the next token", +1),
    "surprise": ("rank correlation of K and the loss of the token itself", +1),
    "rarity": ("rank correlation of K and rarity in the training text", +1),
    "position": ("rank correlation of K and position in the sequence", 0),
    "loss_within_token": (
        "rank correlation of K and the loss of the next token, both less the mean of their token id",
        +1,
    ),
    "share_of_token": ("share of the variance of K between token ids", 0),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--corpus", type=Path, default=Path("data/stdlib"), help="prepared corpus")
    parser.add_argument("--runs", type=Path, default=Path("runs/bench-findings"), help="directory of the trainings")
    parser.add_argument("--evidence", type=Path, default=Path("bench/evidence/findings"), help="directory of what was "
                        "read of each seed")  # fmt: skip
    parser.add_argument("--seeds", type=int, default=5, help="number of trainings")
    parser.add_argument("--layers", type=int, default=8, help="decoder layers of the quickstart model")
    parser.add_argument("--steps", type=int, default=1600, help="optimizer steps of 2,048 tokens")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--sequences", type=int, default=512, help="validation sequences to read")
    parser.add_argument("--workers", type=int, default=2, help="concurrent trainings, each on one core")
    parser.add_argument("--hours", type=float, default=0.0, help="train for this long; 0: only report")
    parser.add_argument("--plot", type=Path, help="file for the figure (needs matplotlib)")
    parser.add_argument("--page", type=Path, help="page whose block 'findings' gets the table, as docs/science.md")


def run(given: argparse.Namespace) -> list[dict[str, Any]]:
    if given.steps < _PARTS:
        raise UserError(f"--steps {given.steps}: use at least {_PARTS}, because K is read in {_PARTS} parts")
    missing = [seed for seed in range(given.seeds) if not _file(given, seed).exists()]
    if given.hours and missing:
        end = time.monotonic() + 3600 * given.hours
        with ThreadPoolExecutor(given.workers) as pool:
            list(pool.map(lambda seed: _train(given, seed, end), missing))
    seeds = [json.loads(path.read_text()) for seed in range(given.seeds) if (path := _file(given, seed)).exists()]
    if not seeds:
        raise UserError(f"--evidence {given.evidence}: has no finished seed; train with --hours")
    rows = rows_of(seeds)
    if given.page is not None:
        given.page.write_text(replace_block(given.page.read_text(), "findings", table(rows)))
    if given.plot is not None:
        _draw(seeds, given.plot)
    return rows


def _file(given: argparse.Namespace, seed: int) -> Path:
    path: Path = given.evidence / f"layers{given.layers}_steps{given.steps}_seed{seed}.json"
    return path


def _train(given: argparse.Namespace, seed: int, end: float) -> None:
    """Trains a seed, or goes on with it, until ``end``; a finished one is read.

    Raises:
        UserError: the training failed.
    """
    if time.monotonic() >= end:
        return
    name = _file(given, seed).stem
    overrides = [
        f"run.dir={given.runs}", f"run.name={name}", f"data.dirs=[{given.corpus}]", f"model.layers={given.layers}",
        "train.global_batch=8", f"train.steps={given.steps}", f"train.seed={seed}",
        f"optimizer.lr={given.learning_rate:g}", *METHODS[_METHOD], "parallel.expert=1", "logging.interval=1",
        "logging.wandb=disabled", "logging.histograms_every=0", "eval.interval=0", "eval.sample_tokens=0",
        "checkpoint.interval=200",
    ]  # fmt: skip
    given.runs.mkdir(parents=True, exist_ok=True)
    log = given.runs / f"{name}.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "train.py", str(_CONFIG), *overrides],
            env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)  # writes a checkpoint
            process.wait()
    outcome = given.runs / name / "outcome.json"
    status = json.loads(outcome.read_text())["status"] if outcome.exists() else "failed"
    if status == "finished":
        read = read_run(given.runs / name, Corpus.open(given.corpus), given.sequences)
        given.evidence.mkdir(parents=True, exist_ok=True)
        _file(given, seed).write_text(json.dumps(read, indent=1) + "\n")
    elif time.monotonic() < end:
        last = (log.read_text().strip().splitlines() or ["no output"])[-1]
        raise UserError(f"seed {seed}: {last.removeprefix('error: ')} (see {log})")
    print(f"seed {seed}: {status}", flush=True)


def read_run(run: Path, corpus: Corpus, sequences: int) -> dict[str, Any]:
    """Everything about a finished run that the statistics and the figure need."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    layers = sorted(
        name for name in lines[0] if name.startswith("moe/layer_") and name.endswith("experts_per_token_mean")
    )
    model = open_trained(run)
    data = PretrainingData([corpus], [], model.config.data.sequence_length, 0, run / "data_index")
    tokens = read_tokens(model, data, sequences)
    rarity_N = -corpus.splits["train"].counts(model.decoder.output_weight_VD.shape[0])[tokens.ids_N]
    return {
        "loss": lines[-1]["eval/loss"],
        "tokens": [part[-1]["train/tokens"] for part in _parts(lines, _PARTS)],
        "experts_by_layer": [[_mean(part, layer) for layer in layers] for part in _parts(lines, _PARTS)],
        "statistics": associations(tokens, rarity_N),
        "experts_by": {
            "loss": by_bins(tokens.experts_N, tokens.next_loss_N),
            "rarity": by_bins(tokens.experts_N, rarity_N),
            "position": by_bins(tokens.experts_N, tokens.position_N),
        },
    }


def _parts(rows: Sequence[Any], number: int) -> list[Sequence[Any]]:
    return [rows[len(rows) * part // number : len(rows) * (part + 1) // number] for part in range(number)]


def _mean(rows: Sequence[dict[str, Any]], name: str) -> float:
    return round(statistics.mean(row[name] for row in rows), 4)


@dataclass(frozen=True)
class Tokens:
    """Tokens of validation text in evaluation mode.

    Attributes:
        ids_N: token ids.
        position_N: position in the sequence.
        experts_N: experts, mean over MoE layers.
        next_loss_N: loss of the next token, which the model predicts with these experts, in nats.
        own_loss_N: loss of the token itself; nan for the first of a sequence.
    """

    ids_N: NDArray[np.int64]
    position_N: NDArray[np.int64]
    experts_N: NDArray[np.float64]
    next_loss_N: NDArray[np.float64]
    own_loss_N: NDArray[np.float64]


@torch.no_grad()
def read_tokens(model: TrainedModel, data: PretrainingData, sequences: int) -> Tokens:
    """Runs the model over the first ``sequences`` validation sequences, or all if fewer."""
    sequences = min(sequences, data.validation_samples)
    rows = model.config.train.micro_batch
    found: list[tuple[torch.Tensor, ...]] = []
    for first in range(0, sequences, rows):
        batch = data.validation_batch(range(first, min(first + rows, sequences))).to(model.device)
        with capture_plans(model.decoder.moe_layers) as plans:
            logits_BSV = model.decoder(batch.tokens_BS)
        loss_BS = F.cross_entropy(logits_BSV.transpose(1, 2).float(), batch.labels_BS, reduction="none")
        own_BS = F.pad(loss_BS[:, :-1], (1, 0), value=float("nan"))
        experts_BS = torch.stack([plan.experts_per_token_T for plan in plans]).double().mean(dim=0).view_as(loss_BS)
        position_BS = torch.arange(loss_BS.shape[1], device=model.device).expand_as(loss_BS)
        found.append((batch.tokens_BS, position_BS, experts_BS, loss_BS.double(), own_BS.double()))
    return Tokens(*(torch.cat(parts).flatten().cpu().numpy() for parts in zip(*found, strict=True)))


def associations(tokens: Tokens, rarity_N: NDArray[np.int64]) -> dict[str, float]:
    """The statistics of STATISTICS that concern tokens."""
    known = ~np.isnan(tokens.own_loss_N)
    _, id_N, count_I = np.unique(tokens.ids_N, return_inverse=True, return_counts=True)
    often = count_I[id_N] >= _FEW
    rest_N, share = _without_means(tokens.experts_N[often], id_N[often])
    loss_rest_N, _ = _without_means(tokens.next_loss_N[often], id_N[often])
    return {
        "loss": _rank(tokens.experts_N, tokens.next_loss_N),
        "surprise": _rank(tokens.experts_N[known], tokens.own_loss_N[known]),
        "rarity": _rank(tokens.experts_N, rarity_N),
        "position": _rank(tokens.experts_N, tokens.position_N),
        "loss_within_token": _rank(rest_N, loss_rest_N),
        "share_of_token": round(share, 4),
    }


def _rank(first_N: NDArray[Any], second_N: NDArray[Any]) -> float:
    """Spearman's rank correlation."""
    return round(float(stats.spearmanr(first_N, second_N).statistic), 4)


def _without_means(values_N: NDArray[np.float64], id_N: NDArray[np.int64]) -> tuple[NDArray[np.float64], float]:
    """The values less the mean of their id, and the share of the variance that the means explain."""
    mean_I = np.bincount(id_N, values_N) / np.maximum(np.bincount(id_N), 1)
    rest_N = values_N - mean_I[id_N]
    return rest_N, float(1 - rest_N.var() / values_N.var())


def by_bins(experts_N: NDArray[np.float64], values_N: NDArray[Any]) -> list[float]:
    """Mean experts of ten equal parts of the tokens, by ascending value (ties in the order of the text)."""
    ordered_N = experts_N[np.argsort(values_N, kind="stable")]
    return [round(float(part_N.mean()), 4) for part_N in np.array_split(ordered_N, _BINS)]


def rows_of(seeds: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each statistic: its values, their mean with interval, and the verdict."""
    values = {name: [seed["statistics"][name] for seed in seeds] for name in seeds[0]["statistics"]}
    tenth = _PARTS // 10
    values["change"] = [_experts(seed, -tenth, None) - _experts(seed, tenth, 2 * tenth) for seed in seeds]
    ends = [np.mean(seed["experts_by_layer"][-tenth:], axis=0) for seed in seeds]
    values["first_minus_last_layer"] = [float(end[0] - end[-1]) for end in ends]
    return [
        {
            "statistic": meaning,
            "mean": (interval := interval_of(values[name])),
            "least": min(values[name]),
            "most": max(values[name]),
            "seeds": len(seeds),
            "verdict": verdict_of(interval, side),
        }
        for name, (meaning, side) in STATISTICS.items()
    ]


def _experts(seed: dict[str, Any], first: int, end: int | None) -> float:
    """Mean experts per token over these parts of the training, all layers."""
    return float(np.mean(seed["experts_by_layer"][first:end]))


def verdict_of(interval: Interval, side: int) -> str:
    """Whether the finding, on this side of 0, is seen; empty if the paper claims nothing."""
    if side == 0:
        return ""
    if interval.verdict == "undecided":
        return "not seen at this size"
    return "seen" if (interval.verdict == "higher") == (side > 0) else "the opposite is seen"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    head = ["| statistic | mean over seeds | least | most | verdict |", "|---|---|---|---|---|"]
    names = ("statistic", "mean", "least", "most", "verdict")
    return "\n".join(head + [f"| {' | '.join(shown(name, row[name]) for name in names)} |" for row in rows])


def verdicts(rows: Sequence[dict[str, Any]]) -> list[str]:
    return [f"{row['statistic']}: {row['verdict']}" for row in rows if row["verdict"]]


def _draw(seeds: Sequence[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 5, figsize=(17, 3.6), layout="constrained")
    experts_PL = np.mean([seed["experts_by_layer"] for seed in seeds], axis=0)
    millions = np.array(seeds[0]["tokens"]) / 1e6
    colors = pyplot.get_cmap("viridis")(np.linspace(0, 0.9, experts_PL.shape[1]))
    for layer, color in enumerate(colors):
        axes[0].plot(millions, experts_PL[:, layer], color=color, linewidth=1, label=f"layer {layer}")
    axes[0].plot(millions, experts_PL.mean(axis=1), color="black", label="mean")
    axes[0].set(xlabel="million tokens", ylabel="experts per token", title="training")
    axes[0].legend(fontsize=6, ncols=2)
    tenth = _PARTS // 10
    _lines(axes[1], [np.mean(seed["experts_by_layer"][-tenth:], axis=0) for seed in seeds], lambda x: x)
    axes[1].set(xlabel="layer", title="end of the training")
    for place, name in enumerate(("loss", "rarity", "position"), start=2):
        _lines(axes[place], [np.array(seed["experts_by"][name]) for seed in seeds], lambda x: x + 1)
        axes[place].set(xlabel=f"tenth of the tokens by {name}", title=f"by {name}")
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _lines(axis: Any, by_seed: Sequence[NDArray[np.float64]], number: Callable[[Any], Any]) -> None:
    """Draws each seed in gray and their mean in black."""
    x = number(np.arange(len(by_seed[0])))
    for values in by_seed:
        axis.plot(x, values, color="gray", linewidth=0.6, alpha=0.7)
    axis.plot(x, np.mean(by_seed, axis=0), color="black", marker="o", markersize=3)
