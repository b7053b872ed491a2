"""Scores of tasks and domains among the rows of the metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dynmoe.train.metrics import Row

# Of what is scored: its figures by name.
Scores = dict[str, float]
# The figure that every task and domain of a model with experts has.
EXPERTS = "experts_per_token_mean"
_KINDS = ("tasks", "domains")
_STDERR = "_stderr"


def scores_row(tasks: Mapping[str, Scores], domains: Mapping[str, Scores]) -> Row:
    """Figures of tasks and domains by name, as metrics: ``eval/tasks/NAME/FIGURE``, ``eval/domains/NAME/FIGURE``."""
    return {
        f"eval/{kind}/{name}/{figure}": value
        for kind, own in zip(_KINDS, (tasks, domains), strict=True)
        for name, scores in own.items()
        for figure, value in scores.items()
    }


def scores_of(row: Row) -> dict[str, Scores]:
    """Figures of every task and domain of a row, by ``tasks/NAME`` or ``domains/NAME``."""
    found: dict[str, Scores] = {}
    for metric, value in row.items():
        if metric.startswith(tuple(f"eval/{kind}/" for kind in _KINDS)):
            name, figure = metric.removeprefix("eval/").rsplit("/", 1)
            found.setdefault(name, {})[figure] = value
    return found


def newest_scores(rows: Sequence[Row]) -> dict[str, Scores]:
    """Of every task and domain each figure as in the newest row that has it."""
    newest: dict[str, Scores] = {}
    for row in rows:
        for name, scores in scores_of(row).items():
            newest.setdefault(name, {}).update(scores)
    return newest


def figures_of(scores: Scores) -> list[str]:
    """What is scored: neither standard errors nor experts."""
    return [figure for figure in scores if figure != EXPERTS and not figure.endswith(_STDERR)]


def shown_score(scores: Scores, figure: str) -> tuple[str, str]:
    """A figure with its standard error, and the experts per token beside it, as text."""
    error = f" ± {scores[figure + _STDERR]:.2g}" if figure + _STDERR in scores else ""
    return f"{scores[figure]:.4g}{error}", f"{scores[EXPERTS]:.2f}" if EXPERTS in scores else "–"
