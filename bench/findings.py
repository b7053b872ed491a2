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
import signal
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.report import current_commit, replace_block, shown
from bench.routing.intervals import Interval, interval_of
from bench.routing.methods import METHODS
from bench.routing.units import fingerprint, read_rows, versions, with_loss, write_evidence
from bench.token_statistics import associations, by_bins, means_by_sequence, read_tokens
from bench.trainings import problem_in, start
from dynmoe.data.batches import PretrainingData
from dynmoe.data.corpus import MANIFEST, Corpus
from dynmoe.errors import UserError
from dynmoe.trained import open_trained

_METHOD = "top-p 0.4, paper"
_PARTS = 40

# Statistic, what it is, on which side of 0 the finding lies (0: it is only reported), and the smallest size that
# counts: a tiny correlation is never 0 for all seeds, as they are read on the same many tokens. Early tokens have less
# context, so they are the harder ones.
_EXPERTS = 0.1
_CORRELATION = 0.05
_OF_SEQUENCES = 0.2  # of 512 sequences of a few long files, the same for all seeds
STATISTICS: dict[str, tuple[str, int, float]] = {
    "change": ("K in the last tenth of the training minus K in the second tenth", -1, _EXPERTS),
    "lower_minus_upper": ("K of the lower half of the layers minus K of the upper half, last tenth", +1, _EXPERTS),
    "without_first": ("K of the lower half minus K of the upper half, without the first layer", +1, _EXPERTS),
    "loss": ("rank correlation of K and the loss of the next token", +1, _CORRELATION),
    "loss_within_token": (
        "rank correlation of K and the loss of the next token, both less the mean of their token id (ids that occur at "
        "least ten times)", +1, _CORRELATION,
    ),
    "loss_of_sequence": ("rank correlation, over sequences, of mean K and mean loss", +1, _OF_SEQUENCES),
    "rarity": ("rank correlation of K and rarity in the training text", +1, _CORRELATION),
    "position": ("rank correlation of K and position in the sequence", -1, _CORRELATION),
    "surprise": ("rank correlation of K and the loss of the token itself", 0, 0.0),
    "share_of_token": ("share of the variance of K between these token ids", 0, 0.0),
}  # fmt: skip


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
    if given.layers < 3:
        raise UserError(f"--layers {given.layers}: use at least 3, because halves are compared without the first layer")
    if given.steps < _PARTS:
        raise UserError(f"--steps {given.steps}: use at least {_PARTS}, because K is read in {_PARTS} parts")
    missing = [seed for seed in range(given.seeds) if _kept(given, seed) is None]
    if given.hours and missing:
        end = time.monotonic() + 3600 * given.hours
        with ThreadPoolExecutor(given.workers) as pool:
            list(pool.map(lambda seed: _train(given, seed, end), missing))
    seeds = [read for seed in range(given.seeds) if (read := _kept(given, seed)) is not None]
    if not seeds:
        raise UserError(f"--evidence {given.evidence}: has no finished seed; train with --hours")
    rows = rows_of(seeds)
    if len(seeds) < given.seeds:
        print(f"{len(seeds)} of {given.seeds} seeds are finished: page and plot stay as they are", flush=True)
        return rows
    if given.page is not None:
        given.page.write_text(replace_block(given.page.read_text(), "findings", table(rows)))
    if given.plot is not None:
        _draw(seeds, given.plot)
    return rows


def _file(given: argparse.Namespace, seed: int) -> Path:
    path: Path = given.evidence / f"layers{given.layers}_steps{given.steps}_seed{seed}.json"
    return path


def _setting(given: argparse.Namespace, seed: int) -> dict[str, Any]:
    """What distinguishes a seed's results from others, apart from the text."""
    overrides = [
        f"model.layers={given.layers}", "train.global_batch=8", f"train.steps={given.steps}", f"train.seed={seed}",
        f"optimizer.lr={given.learning_rate:g}", *METHODS[_METHOD],
    ]  # fmt: skip
    return {"overrides": overrides, "sequences": given.sequences}


def _kept(given: argparse.Namespace, seed: int) -> dict[str, Any] | None:
    """What was read of a seed; None if it is not finished.

    Raises:
        UserError: it was trained with other fields or another text.
    """
    path = _file(given, seed)
    if not path.exists():
        return None
    kept: dict[str, Any] = json.loads(path.read_text())
    own = _setting(given, seed)
    if (given.corpus / MANIFEST).exists():
        own["text"] = fingerprint(given.corpus)
    for name, value in own.items():
        if kept[name] != value:
            raise UserError(f"{path}: {name} is {kept[name]}, not {value}; use another directory for --evidence")
    return kept


def _train(given: argparse.Namespace, seed: int, end: float) -> None:
    """Trains a seed, or goes on with it, until ``end``; a finished one is read.

    Raises:
        UserError: the training failed.
    """
    if time.monotonic() >= end:
        return
    setting = _setting(given, seed)
    # A training may go on with another learning rate, so that it is part of the name.
    name = f"{_file(given, seed).stem}_lr{given.learning_rate:g}"
    given.runs.mkdir(parents=True, exist_ok=True)
    run = given.runs / name
    log = given.runs / f"{name}.log"
    commits = given.runs / f"{name}.commits"
    with commits.open("a") as stream:  # a training that was stopped may go on with other code
        stream.write(current_commit() + "\n")
    with log.open("w") as output:
        process = start(run, given.corpus, [*setting["overrides"], "checkpoint.interval=200"], output)
        try:
            process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)  # writes a checkpoint
            process.wait()
    outcome = run / "outcome.json"
    status = json.loads(outcome.read_text())["status"] if outcome.exists() else "failed"
    if status == "finished":
        read = read_run(run, Corpus.open(given.corpus), given.sequences)
        read |= setting | {"text": fingerprint(given.corpus), "versions": versions(_joined(commits))}
        write_evidence(_file(given, seed), json.dumps(read, indent=1))
    elif time.monotonic() < end:
        raise UserError(f"seed {seed}: {problem_in(log.read_text())} (see {log})")
    print(f"seed {seed}: {status}", flush=True)


def _joined(commits: Path) -> str:
    """The commits of a training's starts, each once."""
    return ", ".join(dict.fromkeys(commits.read_text().splitlines()))


def read_run(run: Path, corpus: Corpus, sequences: int) -> dict[str, Any]:
    """Everything about a finished run that the statistics and the figure need."""
    rows = read_rows(run)
    lines = with_loss(rows)
    layers = sorted(
        name for name in lines[0] if name.startswith("moe/layer_") and name.endswith("experts_per_token_mean")
    )
    model = open_trained(run)
    data = PretrainingData([corpus], model.config.data, 0, run / "data_index")
    tokens = read_tokens(model, data, sequences)
    rarity_N = -corpus.splits["train"].counts(model.decoder.output_weight_VD.shape[0])[tokens.ids_N]
    return {
        "loss": rows[-1]["eval/loss"],
        "tokens": [part[-1]["train/tokens"] for part in _parts(lines, _PARTS)],
        "experts_by_layer": [[_mean(part, layer) for layer in layers] for part in _parts(lines, _PARTS)],
        "statistics": associations(tokens, rarity_N),
        "by_sequence": {
            "experts": means_by_sequence(tokens, tokens.experts_N),
            "loss": means_by_sequence(tokens, tokens.next_loss_N),
        },
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


def rows_of(seeds: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each statistic: its values, their mean with interval, and the verdict."""
    values = {name: [seed["statistics"][name] for seed in seeds] for name in seeds[0]["statistics"]}
    tenth = _PARTS // 10
    values["change"] = [_experts(seed, -tenth, None) - _experts(seed, tenth, 2 * tenth) for seed in seeds]
    ends = [np.mean(seed["experts_by_layer"][-tenth:], axis=0) for seed in seeds]
    values["lower_minus_upper"] = [_lower_minus_upper(end) for end in ends]
    values["without_first"] = [_lower_minus_upper(end[1:]) for end in ends]
    return [
        {
            "statistic": meaning,
            "mean": (interval := interval_of(values[name])),
            "least": min(values[name]),
            "most": max(values[name]),
            "seeds": len(seeds),
            "verdict": verdict_of(interval, side, smallest),
        }
        for name, (meaning, side, smallest) in STATISTICS.items()
    ]


def _lower_minus_upper(experts_L: NDArray[np.float64]) -> float:
    """Difference of the means of the two halves; a layer in the middle is in neither."""
    half = len(experts_L) // 2
    return float(np.mean(experts_L[:half]) - np.mean(experts_L[-half:]))


def _experts(seed: dict[str, Any], first: int, end: int | None) -> float:
    """Mean experts per token over these parts of the training, all layers."""
    return float(np.mean(seed["experts_by_layer"][first:end]))


def verdict_of(interval: Interval, side: int, smallest: float) -> str:
    """Whether the finding, on this side of 0 and of at least this size, is seen; empty if there is no finding."""
    if side == 0:
        return ""
    if interval.low is None:
        return "too few seeds"
    if interval.verdict == "undecided" or abs(interval.mean) < smallest:
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
