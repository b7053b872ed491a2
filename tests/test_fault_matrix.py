"""The fault matrix in docs/reliability.md lists exactly the test files of each row."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
ROWS = [f"F{number}" for number in range(1, 30)]


def files_by_row() -> dict[str, set[str]]:
    """The test files of each row of the matrix."""
    found: dict[str, set[str]] = {row: set() for row in ROWS}
    for path in (ROOT / "tests").rglob("test_*.py"):
        for number in re.findall(r"^def test_f(\d\d)_", path.read_text(), re.MULTILINE):
            found[f"F{int(number)}"].add(path.relative_to(ROOT / "tests").as_posix())
    return found


def test_every_row_has_a_test_of_its_name():
    assert [row for row, files in files_by_row().items() if not files] == []


def test_the_page_names_the_tests_of_every_row():
    page = (ROOT / "docs" / "reliability.md").read_text()
    named = {
        cells[1].strip(): set(re.findall(r"`([a-z_/]+\.py)`", cells[-2]))
        for line in page.splitlines()
        if (cells := line.split("|"))[0] == "" and re.fullmatch(r" F\d+ ", cells[1:2][0] if cells[1:] else "")
    }
    assert named == files_by_row()
