"""Output of benchmarks: tables for the terminal and for docs/performance.md, and comparisons with targets."""

from __future__ import annotations

import json
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from dynmoe.errors import UserError
from harness.processes import ROOT

Rows = list[dict[str, Any]]


def machine() -> str:
    """Describes the machine."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{_cpu_name()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} thread(s)"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else f"{platform.machine()} CPU"


def verdict(what: str, value: float, at_most: float) -> str:
    """Compares a figure with its upper limit, in one line."""
    outcome = "reached" if value <= at_most else f"missed by {value - at_most:.3f}"
    return f"{what}: {value:.3f}, target at most {at_most:g}: {outcome}"


def verdict_at_least(what: str, value: float, at_least: float) -> str:
    """Compares a figure with its lower limit, in one line."""
    outcome = "reached" if value >= at_least else f"missed by {at_least - value:.3f}"
    return f"{what}: {value:.3f}, target at least {at_least:g}: {outcome}"


def split_constants(rows: Rows) -> tuple[dict[str, Any], list[str]]:
    """Returns the values that are equal in every row, and the remaining columns."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    same = {name: rows[0].get(name) for name in columns if len({str(row.get(name)) for row in rows}) == 1}
    if len(rows) == 1:
        same = {}
    return same, [name for name in columns if name not in same]


def shown(column: str, value: Any) -> str:
    if value is None:
        return ""
    if column.endswith("_bytes"):
        return f"{value / 1e6:.1f} MB"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def caption(rows: Rows) -> str:
    same, _ = split_constants(rows)
    return ", ".join(f"{name.replace('_', ' ')} {shown(name, value)}" for name, value in same.items())


def print_table(name: str, rows: Rows) -> None:
    table = Table(title=f"{name} ({machine()})", caption=caption(rows))
    _, columns = split_constants(rows)
    for column in columns:
        table.add_column(column.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*(shown(column, row.get(column)) for column in columns))
    Console(width=160).print(table)


def without_details(rows: Rows) -> Rows:
    """The rows without columns that are no table cell: points of a plot, and rows of a part."""
    return [{key: value for key, value in row.items() if key not in ("curve", "rows")} for row in rows]


def write_json(path: Path, rows: Rows, commit: str) -> None:
    document = {"machine": machine(), "torch": torch.__version__, "commit": commit, "rows": rows}
    path.write_text(json.dumps(document, indent=1) + "\n")


def current_commit() -> str:
    """The commit of this code, marked if the code differs from it; unknown outside a clone. Ask before measuring."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "*.py", "*.c")
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def replace_block(page: str, name: str, text: str) -> str:
    """The page with ``text`` between the comments ``<!-- NAME -->`` and ``<!-- end of NAME -->``.

    Raises:
        UserError: the page lacks one of the comments.
    """
    opening, closing = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, found, rest = page.partition(opening)
    _, end, after = rest.partition(closing)
    if not found or not end:
        raise UserError(f"the page lacks the comments {opening} and {closing}; add them where the text belongs")
    return f"{before}{opening}\n\n{text.strip()}\n\n{closing}{after}"


def markdown(title: str, rows: Rows, verdicts: list[str], picture: str | None, level: int = 2) -> str:
    """A section of the page: description, table, targets, picture."""
    _, columns = split_constants(rows)
    lines = [f"{'#' * level} {title}", ""]
    if caption(rows):
        lines += [f"{caption(rows)}.", ""]
    lines += [
        "| " + " | ".join(column.replace("_", " ") for column in columns) + " |",
        "|" + "|".join("---" for _ in columns) + "|",
        *("| " + " | ".join(shown(column, row.get(column)) for column in columns) + " |" for row in rows),
        "",
    ]
    if verdicts:
        lines += [*(f"- {line}" for line in verdicts), ""]
    if picture:
        lines += [f"![{title}]({picture})", ""]
    return "\n".join(lines)


def with_sections(page: str, head: str, sections: list[str]) -> str:
    """The page with these sections in place of those of the same number, new ones at the end, and all others as they
    are."""
    left = {_number(section): section for section in sections}
    kept = [left.pop(_number(section), section) for section in re.split(r"^(?=## )", page, flags=re.MULTILINE)[1:]]
    return "\n".join(part.rstrip("\n") + "\n" for part in (head, *kept, *left.values()))


def _number(section: str) -> str:
    """What a section is called before the colon: Benchmark 15."""
    return section.splitlines()[0].partition(":")[0]
