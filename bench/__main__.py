"""python -m bench NAME [--json FILE]"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench import gpu_smoke, layer, routing, statistics
from dynmoe.cli import run_tool

BENCHMARKS = {"gpu_smoke": gpu_smoke, "layer": layer, "routing": routing, "statistics": statistics}


def machine() -> str:
    """What the figures were taken on."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} thread(s)"


def main() -> None:
    parser = argparse.ArgumentParser("python -m bench", description="Benchmarks; figures are ratios within one run.")
    names = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    for name, module in BENCHMARKS.items():
        sub = names.add_parser(
            name, help=str(module.__doc__).splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        sub.add_argument("--json", type=Path, help="write the rows there")
        module.add_arguments(sub)
    given = parser.parse_args()
    rows = BENCHMARKS[given.name].run(given)
    _print(rows)
    if given.json is not None:
        document = {"machine": machine(), "torch": torch.__version__, "rows": rows}
        given.json.write_text(json.dumps(document, indent=1) + "\n")


def _print(rows: list[dict[str, Any]]) -> None:
    hidden = {"benchmark", "tokens", "hidden", "width"}
    columns = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in hidden]
    table = Table(title=f"{rows[0]['benchmark']} ({machine()})")
    for column in columns:
        table.add_column(column.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*(_shown(column, row.get(column)) for column in columns))
    Console(width=200).print(table)


def _shown(column: str, value: Any) -> str:
    if value is None:
        return ""
    if column.endswith("_bytes"):
        return f"{value / 1e6:.1f} MB"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    run_tool(main)
