"""Parts of documentation that a command writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

_END = "<!-- until here -->\n"


def rows(cells: Sequence[Sequence[str]]) -> str:
    """A table, of which the first row is the header."""
    lines = [cells[0], ["---"] * len(cells[0]), *cells[1:]]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def write(page: Path, command: str, text: str) -> None:
    """Puts ``text`` where the command's last one stood."""
    begin = f"<!-- written by {command} -->\n"
    before, rest = page.read_text().split(begin)
    page.write_text(f"{before}{begin}\n{text}\n{_END}{rest.split(_END, 1)[1]}")
