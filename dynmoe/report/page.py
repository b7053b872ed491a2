"""Self-contained pages: no network access, readable on a phone and in dark mode."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from plotly.offline import get_plotlyjs

from dynmoe.report.pictures import sections, zero_throughout
from dynmoe.report.runs import Run
from dynmoe.train.checkpoint import write_atomically
from dynmoe.train.resume import flatten
from dynmoe.train.scores import figures_of, shown_score

_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("dynmoe.report"), autoescape=True, undefined=jinja2.StrictUndefined,
    trim_blocks=True, lstrip_blocks=True,
)  # fmt: skip
# Shown only if eval/loss weights several corpora as training does.
_BY_TOKENS = "eval/loss_by_tokens"
# Rows of the summary: heading, metric, format, factor.
_SUMMARY = (
    ("step", "train/step", "{:.0f}", 1.0),
    ("tokens (M)", "train/tokens", "{:.2f}", 1e-6),
    ("training loss", "train/lm_loss", "{:.3f}", 1.0),
    ("validation loss", "eval/loss", "{:.3f}", 1.0),
    ("validation loss by tokens", _BY_TOKENS, "{:.3f}", 1.0),
    ("experts per token", "moe/experts_per_token_mean", "{:.2f}", 1.0),
    ("activated FLOPs (P)", "train/cumulative_flops", "{:.4g}", 1e-15),
    ("tokens/s", "train/tokens_per_s", "{:.0f}", 1.0),
    ("wall clock (min)", "train/wall_clock_s", "{:.1f}", 1 / 60),
    ("peak memory (GiB)", "memory/peak_gib", "{:.2f}", 1.0),
)


def write_page(template: str, output: Path, **values: Any) -> None:
    """Renders one of the package's templates into a file."""
    write_atomically(output, _TEMPLATES.get_template(template).render(**values))


def embedded(figure: Any, name: str) -> str:
    """A figure as part of a page that contains plotly."""
    html: str = figure.to_html(
        full_html=False, include_plotlyjs=False, div_id=f"figure-{name}", auto_play=False,
        config={"responsive": True, "displaylogo": False},
    )  # fmt: skip
    return html


def write_report(runs: Sequence[Run], output: Path) -> None:
    """Writes the report of one run, or of several in comparison.

    Figures that are zero throughout are listed at the end of their section instead of drawn.
    """
    zeros = zero_throughout(runs)
    drawn = sections(runs)
    pages = {
        section: [embedded(figure, name) for name, figure in own.items() if name not in zeros]
        for section, own in drawn.items()
    }
    quiet = {
        section: "; ".join(zeros[name][0].lower() + zeros[name][1:] for name in own if name in zeros)
        for section, own in drawn.items()
    }
    write_page(
        "report.html.j2", output, runs=runs, sections=pages, zeros=quiet, plotly=get_plotlyjs(), headline=_headline,
        summary=[(heading, [_shown(run, metric, form, factor) for run in runs])
                 for heading, metric, form, factor in _SUMMARY
                 if metric != _BY_TOKENS or any(run.last(metric) is not None for run in runs)],
        scores=_scores(runs), differences=_differences(runs),
    )  # fmt: skip


def _headline(run: Run) -> str:
    """What was trained, by which engine, and how it ended."""
    ended = "not finished" if run.outcome is None else str(run.outcome["status"])
    if run.config is None:
        return ended
    model = run.config.model
    kind = f"{model.moe_size} experts per layer, {model.router.kind} router" if model.moe_layers else "dense"
    return f"{run.config.engine}, {model.layers} layers, {kind}, {ended}"


def _shown(run: Run, metric: str, form: str, factor: float) -> str:
    value = run.last(metric)
    return "–" if value is None else form.format(value * factor)


def _scores(runs: Sequence[Run]) -> list[tuple[str, str, list[tuple[str, str]]]]:
    """Rows of task or domain, metric, and for each run its value and experts per token."""
    found = [run.scores for run in runs]
    rows = {(name, figure): None for own in found for name, scores in own.items() for figure in figures_of(scores)}
    return [
        (name, figure, [
            shown_score(own[name], figure) if figure in own.get(name, {}) else ("–", "–") for own in found
        ])
        for name, figure in rows
    ]  # fmt: skip


def _differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Configuration fields in which the runs differ."""
    configs = [{} if run.config is None else dataclasses.asdict(run.config) for run in runs]
    flat = [{name: str(value) for name, value in flatten(config)} for config in configs]
    names = sorted({name for own in flat for name in own})
    rows = [(name, [own.get(name, "?") for own in flat]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1]
