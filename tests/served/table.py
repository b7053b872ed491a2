"""The table of ``docs/serving.md``: what each client answers for each model, as it was measured last."""

from __future__ import annotations

from collections.abc import Mapping

from tests.pages import rows

NOT_ASKED = "–"
_LONGEST = 80  # characters of a cell


def table(cells: Mapping[str, Mapping[str, str]], versions: Mapping[str, str]) -> str:
    """A row for each model, a column for each client, and the versions of all packages that took part.

    Args:
        cells: by client, then by model.
        versions: by package.
    """
    models = dict.fromkeys(model for column in cells.values() for model in column)
    lines = [[model, *(_short(column.get(model, NOT_ASKED)) for column in cells.values())] for model in models]
    return f"{rows([['', *cells], *lines])}\n{', '.join(f'{name} {version}' for name, version in versions.items())}.\n"


def _short(cell: str) -> str:
    cell = cell.replace("|", "/").replace("`", "'").replace("<", "(").replace(">", ")")
    return cell if len(cell) <= _LONGEST else f"{cell[: _LONGEST - 1]}…"
