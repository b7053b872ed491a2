"""Selects and orders the figures of a report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dynmoe.report.runs import Run, read_run

if TYPE_CHECKING:
    import plotly.graph_objects as go

# Sections of per-layer figures: metric, title, axis.
_ROUTER = (
    ("router_entropy", "Router entropy", "nats"),
    ("top1_margin", "Margin between the best and the second-best score", "score"),
    ("auxiliary_loss", "Auxiliary losses times their coefficients", "nats"),
)
_LOAD = (
    ("load_max_over_mean", "Imbalance: load of the busiest expert over the mean", "× mean load"),
    ("ep_rank_load_max_over_mean", "Imbalance: load of the busiest expert-parallel rank over the mean", "× mean load"),
    ("dead_experts", "Active experts without tokens", "experts"),
    ("active_experts", "Active experts", "experts"),
    ("dropped_routes_frac", "Dropped routes", "share of routes"),
    ("tokens_without_expert_frac", "Tokens without an expert", "share of tokens"),
)
_SPEED = (
    ("train/tokens_per_s", "Throughput", "tokens/s"),
    ("train/tflops_per_rank", "Activated FLOPs per second per rank", "TFLOP/s"),
    ("train/mfu", "Model FLOPs utilization (activated FLOPs)", "share of peak"),
    ("train/step_time_s", "Step time", "s"),
    ("memory/peak_gib", "Peak memory of the first rank", "GiB"),
)
_OPTIMIZER = (
    ("train/grad_norm", "Gradient norm", "norm"),
    ("train/learning_rate", "Learning rate", "learning rate"),
)


def sections(runs: Sequence[Run]) -> dict[str, dict[str, go.Figure]]:
    """Figures by section and name, without those that have no data."""
    from dynmoe.report import figures  # training loads plotly only if a view shows pictures

    drawn: dict[str, dict[str, go.Figure | None]] = {
        "Loss": {"loss": figures.loss(runs)},
        "Experts per token": {
            "experts_per_token": figures.experts_per_token(runs),
            **{f"histogram_{number}": figures.histogram(run) for number, run in enumerate(runs)},
        },
        "Tasks and domains": {
            "experts_by_task": figures.experts_by_task(runs), "scores": figures.scores(runs),
        },
        "Load of the experts": {
            **{f"load_{number}": figures.load(run) for number, run in enumerate(runs)},
            **{name: figures.by_layer(runs, name, title, y) for name, title, y in _LOAD},
        },
        "Experts added and removed": {
            f"adaptation_{number}": figures.adaptation(run) for number, run in enumerate(runs)
        },
        "Router": {name: figures.by_layer(runs, name, title, y) for name, title, y in _ROUTER},
        "Speed and memory": {
            _short(name): figures.over_time(runs, name, title, y) for name, title, y in _SPEED
        },
        "Optimizer": {_short(name): figures.over_time(runs, name, title, y) for name, title, y in _OPTIMIZER},
    }  # fmt: skip
    kept = {
        section: {name: figure for name, figure in own.items() if figure is not None} for section, own in drawn.items()
    }
    return {section: own for section, own in kept.items() if own}


def zero_throughout(runs: Sequence[Run]) -> dict[str, str]:
    """Titles, by name, of the figures that are zero in all runs that have them."""
    places = ["moe", *(f"moe/layer_{layer:02d}" for layer in sorted({layer for run in runs for layer in run.layers}))]
    metrics = {(name, title): [f"{place}/{name}" for place in places] for name, title, _ in _ROUTER + _LOAD}
    metrics |= {(_short(metric), title): [metric] for metric, title, _ in _SPEED + _OPTIMIZER}
    return {name: title for (name, title), own in metrics.items() if _are_zero(runs, own)}


def _are_zero(runs: Sequence[Run], metrics: Sequence[str]) -> bool:
    """Whether there are values and all are 0; checks more values than the figure may draw."""
    found = False
    for metric in metrics:
        for run in runs:
            values = run.series(metric)[1]
            if any(value != 0 for value in values):
                return False
            found = found or bool(values)
    return found


def _short(metric: str) -> str:
    return metric.split("/")[1]


def pictures_of_run(path: Path) -> dict[str, go.Figure]:
    """Figures of a run's report by name, for other views."""
    return {name: figure for own in sections([read_run(path)]).values() for name, figure in own.items()}
