"""Scores of tasks and domains in the rows of metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dynmoe.train.metrics import Row

# Metrics of one task or domain, by name.
Scores = dict[str, float]
# The metric that every task and domain of an MoE model has.
EXPERTS = "experts_per_token_mean"
_KINDS = ("tasks", "domains")
_STDERR = "_stderr"


def scores_row(tasks: Mapping[str, Scores], domains: Mapping[str, Scores]) -> Row:
    """Scores of tasks and domains by name, as metrics ``eval/tasks/NAME/FIGURE`` and ``eval/domains/NAME/FIGURE``."""
    return {
        f"eval/{kind}/{name}/{figure}": value
        for kind, own in zip(_KINDS, (tasks, domains), strict=True)
        for name, scores in own.items()
        for figure, value in scores.items()
    }


def scores_of(row: Row) -> dict[str, Scores]:
    """Scores of every task and domain in a row, by ``tasks/NAME`` or ``domains/NAME``."""
    found: dict[str, Scores] = {}
    for metric, value in row.items():
        if metric.startswith(tuple(f"eval/{kind}/" for kind in _KINDS)):
            name, figure = metric.removeprefix("eval/").rsplit("/", 1)
            found.setdefault(name, {})[figure] = value
    return found


def newest_scores(rows: Sequence[Row]) -> dict[str, Scores]:
    """Scores of every task and domain, each value from the latest row that has it."""
    newest: dict[str, Scores] = {}
    for row in rows:
        for name, scores in scores_of(row).items():
            newest.setdefault(name, {}).update(scores)
    return newest


def figures_of(scores: Scores) -> list[str]:
    """Names of the scores, without standard errors and experts per token."""
    return [figure for figure in scores if figure != EXPERTS and not figure.endswith(_STDERR)]


def shown_score(scores: Scores, figure: str) -> tuple[str, str]:
    """A score with its standard error, and experts per token, as text."""
    error = f" ± {scores[figure + _STDERR]:.2g}" if figure + _STDERR in scores else ""
    return f"{scores[figure]:.4g}{error}", f"{scores[EXPERTS]:.2f}" if EXPERTS in scores else "–"
