"""Scores against experts per token: checkpoints evaluated at several budgets, next to others at their own budget."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

from dynmoe.errors import UserError
from dynmoe.report.figures import budget_curve
from dynmoe.report.page import embedded, write_page
from dynmoe.report.runs import Run
from dynmoe.train.scores import EXPERTS, Scores, figures_of, scores_of


@dataclass(frozen=True)
class Evaluated:
    """Scores of a checkpoint at one budget, by task or domain; ``budget`` is None for that of its training."""

    budget: float | None
    scores: dict[str, Scores]


def evaluations(run: Run) -> list[Evaluated]:
    """The newest evaluation of a run at several budgets, or else its latest scores.

    Raises:
        UserError: the run has neither, or the file cannot be read.
    """
    files = sorted((run.path / "evaluations").glob("step_*_budgets.json"))
    if files:
        return [Evaluated(own["experts_per_token"], scores_of(own["scores"])) for own in _read(files[-1])]
    if not run.scores:
        cure = f"run python -m dynmoe.evaluate {run.path} --experts-per-token with several numbers"
        raise UserError(f"{run.path}: was not evaluated; {cure}, or without the option if it has one budget")
    return [Evaluated(None, run.scores)]


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        found: list[dict[str, Any]] = json.loads(path.read_text())["budgets"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: cannot be read ({error}); evaluate the run again") from None
    return found


def write_budget_page(runs: Sequence[Run], output: Path) -> None:
    """Writes a page with a figure for each score, and a table.

    Raises:
        UserError: a run was not evaluated.
    """
    found = {run.name: evaluations(run) for run in runs}
    names = {
        (name, figure): None
        for own in found.values() for one in own for name, scores in one.scores.items() for figure in figures_of(scores)
    }  # fmt: skip
    figures = []
    rows = []
    for number, (name, figure) in enumerate(names):
        curves = {}
        for run, own in found.items():
            having = [one for one in own if figure in one.scores.get(name, {}) and EXPERTS in one.scores[name]]
            if having:
                curves[run] = [(one.scores[name][EXPERTS], one.scores[name][figure]) for one in having]
                rows += [
                    (run, "–" if one.budget is None else f"{one.budget:g}", name, figure,
                     f"{one.scores[name][EXPERTS]:.3f}", f"{one.scores[name][figure]:.4f}")
                    for one in having
                ]  # fmt: skip
        figures.append(embedded(budget_curve(f"{name}: {figure}", curves), f"budget-{number}"))
    write_page("budget.html.j2", output, runs=list(found), figures=figures, rows=rows, plotly=get_plotlyjs())
