"""The table of ``docs/serving.md``: the latest results of each client for each model."""

from __future__ import annotations

from collections.abc import Mapping

from tests.pages import rows

NOT_ASKED = "–"
_LONGEST = 80  # characters per cell


def table(cells: Mapping[str, Mapping[str, str]], versions: Mapping[str, str]) -> str:
    """Formats a row per model, a column per client, and the versions of all packages.

    Args:
        cells: results by client, then by model.
        versions: versions by package.
    """
    models = dict.fromkeys(model for column in cells.values() for model in column)
    lines = [[model, *(_short(column.get(model, NOT_ASKED)) for column in cells.values())] for model in models]
    return f"{rows([['', *cells], *lines])}\n{', '.join(f'{name} {version}' for name, version in versions.items())}.\n"


def _short(cell: str) -> str:
    cell = cell.replace("|", "/").replace("`", "'").replace("<", "(").replace(">", ")")
    return cell if len(cell) <= _LONGEST else f"{cell[: _LONGEST - 1]}…"
