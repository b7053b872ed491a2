"""A day with a GPU: our kernels checked, the layer against its floor, unfused products and SonicMoE, both engines.

One part after another, each a process of its own that may take its share of the time that is left: `kernels` compares
output and gradients with a loop over experts; `layer` and `grid` time the layer, `grid` over experts per token and load
of the busiest expert; `engines` trains 50 steps with each; `tiles` searches tiles for a minute; `sonic` times SonicMoE
where it is installed; `mxfp8` times MXFP8 products against bf16 where the card has them. A part that takes too long is
stopped and keeps the rows that it has.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch

from bench import gpu_kernels, gpu_layer
from bench.gpu_parts import SKIPPED
from bench.report import Rows, current_commit, print_table, write_json
from harness.processes import CPU, ROOT


@dataclass(frozen=True)
class Part:
    """``share``: of the time, by weight among the parts that are left; ``decides``: it must run to its end."""

    name: str
    share: float
    decides: bool = False


# In order of importance.
PARTS = [
    Part("kernels", 36, decides=True), Part("layer", 20), Part("engines", 20, decides=True), Part("grid", 12),
    Part("tiles", 12), Part("sonic", 16), Part("mxfp8", 12),
]  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=float, default=9.0, help="time for all parts together")
    names = [part.name for part in PARTS]
    shown = f"parts to run, of {', '.join(names)}"
    parser.add_argument("--parts", nargs="+", default=names, choices=names, metavar="PART", help=shown)
    parser.set_defaults(json=Path("runs/gpu_day.json"))


def run(given: argparse.Namespace) -> Rows:
    """Runs the parts; writes the JSON after each, and their output beside it.

    Returns:
        A row for each part, with its own rows under "rows".
    """
    end = time.monotonic() + 60 * given.minutes
    parts = [part for part in PARTS if part.name in given.parts]
    given.json.parent.mkdir(parents=True, exist_ok=True)
    if not torch.cuda.is_available():
        print("no GPU: a rehearsal in small, whose figures mean nothing")
    commit = current_commit()
    rows: Rows = []
    with given.json.with_suffix(".log").open("w") as log:
        for number, part in enumerate(parts):
            share = part.share / sum(other.share for other in parts[number:])
            row = _run_part(part, share * max(end - time.monotonic(), 0.0), log)
            rows.append(row)
            write_json(given.json, rows, commit)
            _say(row)
    print(f"output of all parts: {log.name}")
    return rows


def _run_part(part: Part, seconds: float, log: TextIO) -> dict[str, Any]:
    log.write(f"\n== {part.name}, at most {seconds:.0f} s\n")
    log.flush()
    begun = log.tell()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.touch()
        start = time.monotonic()
        status = _wait(command(part.name, path, seconds), seconds, log)
        taken = time.monotonic() - start
        # A part that was stopped may have left half a line.
        rows = [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    outcome = {None: "stopped", 0: "done", SKIPPED: "skipped"}.get(status, f"failed with status {status}")
    row = {"part": part.name, "outcome": outcome, "seconds": taken, "measured": len(rows), "rows": rows}
    return row if status == 0 else row | {"last_line": _last_line(Path(log.name), begun)}


def command(name: str, rows: Path, seconds: float) -> list[str]:
    """The process of a part."""
    return [sys.executable, "-m", "bench.gpu_parts", name, "--rows", str(rows), "--seconds", f"{seconds:.0f}"]


def _wait(arguments: list[str], seconds: float, log: TextIO) -> int | None:
    """The exit status of a process; None if it was stopped, with all that it started, because it took longer."""
    small = {} if torch.cuda.is_available() else CPU | {"TRITON_INTERPRET": "1"}
    environment = os.environ | small | {"PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        arguments, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _last_line(log: Path, begun: int) -> str:
    with log.open("rb") as file:
        file.seek(begun)
        lines = file.read().decode(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _say(row: dict[str, Any]) -> None:
    if row["rows"]:
        print_table(row["part"], row["rows"])
    print(f"{row['part']}: {row['outcome']} after {row['seconds']:.0f} s", flush=True)


def verdicts(rows: Rows) -> list[str]:
    found = {row["part"]: row["rows"] for row in rows}
    return [
        *(gpu_kernels.verdicts(found["kernels"]) if found.get("kernels") else []),
        *(line for name in ("layer", "grid") for line in gpu_layer.verdicts(found.get(name, []))),
    ]


def failures(rows: Rows) -> list[str]:
    """What is wrong: a kernel, a part that failed, or one that decides and did not run to its end."""
    deciding = {part.name for part in PARTS if part.decides}
    wrong = [
        f"{row['part']} {row['outcome']}" for row in rows
        if row["outcome"].startswith("failed") or (row["part"] in deciding and row["outcome"] != "done")
    ]  # fmt: skip
    return wrong + [line for row in rows if row["part"] == "kernels" for line in gpu_kernels.failures(row["rows"])]
