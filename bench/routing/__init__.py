"""Does dynamic routing pay? Validation loss of each router minus that of top-2, at equal measured FLOPs and tokens.

Each method trains the quickstart model on one core with paired seeds: within a cell (a width and a corpus), runs with
the same seed have the same shared initial weights and the same order of data. The learning rate of each method is swept
first. Then each method trains on the same tokens as top-2. If its measured FLOPs differ by more than 1 %, it trains
again, for as many steps as have the same FLOPs. Every unit is one training of a few minutes and one JSON file below
``--evidence``; the command may be stopped at any time and goes on with the units that are missing.
"""

from __future__ import annotations

import argparse
import statistics
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from bench.report import replace_block
from bench.routing.comparison import Comparison, Plan, verdicts
from bench.routing.methods import METHODS, REFERENCE, REFERENCES, RENORMALIZED
from bench.routing.units import Cell, Evidence, Unit
from dynmoe.errors import UserError

__all__ = ["add_arguments", "plot", "run", "tables", "verdicts"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, metavar="METHOD",
                        help=f"methods to compare: {'; '.join(METHODS)}")  # fmt: skip
    parser.add_argument("--corpora", nargs="+", default=["code=data/stdlib", "docs=data/debian"], metavar="NAME=DIR",
                        help="prepared corpora; the learning rate is swept on the first")  # fmt: skip
    parser.add_argument("--cells", nargs="+", default=["code-128", "docs-128", "code-256"], metavar="NAME-WIDTH",
                        help="corpora with widths of the model and its experts, to compare in")  # fmt: skip
    parser.add_argument("--learning-rates", nargs="+", type=float, default=[1.5e-3, 3e-3, 6e-3], help="swept values")
    parser.add_argument("--seeds", type=int, default=5, help="paired runs of each method")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of 2,048 tokens")
    parser.add_argument("--workers", type=int, default=2, help="concurrent units, each on one core")
    parser.add_argument("--hours", type=float, default=0.0, help="start units for this long; 0: only report")
    parser.add_argument("--evidence", type=Path, default=Path("bench/evidence/routing"), help="directory of the units")
    parser.add_argument("--page", type=Path, help="page whose block 'routing' gets the tables, as docs/science.md")
    parser.add_argument("--scratch", type=Path, default=Path("runs/bench-routing"), help="directory of unfinished runs")


def run(given: argparse.Namespace) -> list[dict[str, Any]]:
    comparison, evidence = open_study(given)
    if given.hours:
        _train(comparison, evidence, given.workers, given.hours)
    rows = list(comparison.rows())
    if not rows:
        raise UserError(f"--evidence {given.evidence}: has no complete pair of these methods; train some with --hours")
    if given.page is not None:
        given.page.write_text(replace_block(given.page.read_text(), "routing", tables(rows)))
    return rows


def open_study(given: argparse.Namespace) -> tuple[Comparison, Evidence]:
    """The comparison that the arguments describe, and its units.

    Raises:
        UserError: the arguments contradict each other.
    """
    corpora = dict(_named(text) for text in given.corpora)
    for method in REFERENCES:
        if method not in given.methods:
            raise UserError(f"--methods: {method} is missing, with which all others are compared; add it")
    plan = Plan(
        methods=given.methods,
        cells=[_cell(text, corpora) for text in given.cells],
        learning_rates=given.learning_rates,
        swept_on=next(iter(corpora)),
        seeds=given.seeds,
        steps=given.steps,
    )
    evidence = Evidence(given.evidence, corpora, given.scratch)
    return Comparison(plan, evidence.get), evidence


def tables(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown: a table for each cell, the verdicts, and the fields of each router."""
    if not rows:
        return "Not measured yet: the units of the first cell are being trained."
    lines: list[str] = []
    for cell in dict.fromkeys(Cell(row["width"], row["corpus"]) for row in rows):
        own = [row for row in rows if Cell(row["width"], row["corpus"]) == cell]
        known = f"{own[0]['seeds']} seeds" if own[0]["cell_is_complete"] else "not complete"
        lines += [f"**{cell}**: {known}, loss of top-2 {own[0]['loss']:.3f}", ""]
        lines += [f"| {' | '.join(_COLUMNS)} |", "|" + "---|" * len(_COLUMNS)]
        lines += [*map(_line, own), ""]
    lines += [*(f"- {line}" for line in verdicts(rows)), "", "| router | fields |", "|---|---|"]
    lines += [
        f"| {method} | `{' '.join(METHODS[method])}` |" for method in dict.fromkeys(row["method"] for row in rows)
    ]
    return "\n".join(lines)


_COLUMNS = (
    "router", "learning rate", "K, training", "K, evaluation", "busiest expert", "FLOPs",
    "loss − top-2, same tokens", "tokens", "loss − top-2, same FLOPs", "loss − renormalized top-2, same FLOPs",
)  # fmt: skip


def _line(row: dict[str, Any]) -> str:
    notes = [
        f"{number} pair{'s' * (number > 1)} {what}"
        for number, what in ((row["pairs_to_come"], "to come"), (row["pairs_without_match"], "without match"))
        if number
    ]
    note = f" ({', '.join(notes)})" if notes else ""
    cells = [
        row["method"], f"{row['learning_rate']:g}", f"{row['experts']:.2f}", f"{row['experts_evaluated']:.2f}",
        f"× {row['load_max_over_mean']:.1f}", f"× {row['flops_ratio']:.3f}", row["same_tokens"],
        f"× {row['tokens_ratio']:.3f}" if "tokens_ratio" in row else "", f"{row.get('same_flops', '')}{note}",
        row.get("same_flops_renormalized", "") if row["method"] != RENORMALIZED else "",
    ]  # fmt: skip
    if row["method"] == REFERENCE:
        cells[6:] = ["", "", note.strip(), ""]
    return f"| {' | '.join(map(str, cells))} |"


def _named(text: str) -> tuple[str, Path]:
    name, _, path = text.partition("=")
    if not name or not path:
        raise UserError(f"--corpora {text}: is not NAME=DIR; use for example code=data/stdlib")
    return name, Path(path)


def _cell(text: str, corpora: dict[str, Path]) -> Cell:
    corpus, _, width = text.rpartition("-")
    if corpus not in corpora or not width.isdecimal():
        raise UserError(f"--cells {text}: is not NAME-WIDTH; use for example {next(iter(corpora))}-128")
    return Cell(int(width), corpus)


def _train(comparison: Comparison, evidence: Evidence, workers: int, hours: float) -> None:
    """Trains missing units until ``hours`` have passed; then finishes those that have started.

    Raises:
        UserError: units failed; the others were trained nevertheless.
    """
    end = time.monotonic() + 3600 * hours
    running: dict[Future[None], Unit] = {}
    failed: dict[Unit, UserError] = {}
    with ThreadPoolExecutor(workers) as pool:
        while True:
            if time.monotonic() < end:
                for unit in comparison.missing():
                    if len(running) == workers:
                        break
                    if unit not in running.values() and unit not in failed:
                        running[pool.submit(evidence.train, unit)] = unit
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                unit = running.pop(future)
                try:
                    future.result()
                    print(f"{unit.path}: done", flush=True)
                except UserError as error:
                    failed[unit] = error
                    print(f"failed: {error}", flush=True)
    if failed:
        raise UserError(f"{len(failed)} units failed, the first: {next(iter(failed.values()))}; call again to repeat")


def plot(rows: list[dict[str, Any]], axes: Any) -> None:
    """Draws the difference to top-2 with renormalized gates at equal FLOPs, for each method and complete cell.

    A difference without an interval, because a pair has no match, is a hollow point.
    """
    key = "same_flops_renormalized"
    rows = [row for row in rows if key in row and row["method"] != RENORMALIZED and row["cell_is_complete"]]
    cells = list(dict.fromkeys(Cell(row["width"], row["corpus"]) for row in rows))
    means = {
        method: statistics.mean(row[key].mean for row in rows if row["method"] == method)
        for method in dict.fromkeys(row["method"] for row in rows)
    }
    order = sorted(means, key=lambda method: -means[method])
    for place, cell in enumerate(cells):
        own = [row for row in rows if Cell(row["width"], row["corpus"]) == cell]
        heights = [order.index(row["method"]) - 0.6 * ((place + 0.5) / len(cells) - 0.5) for row in own]
        differences = [row[key].mean for row in own]
        below = [mean - (mean if low is None else low) for mean, low, _ in (row[key] for row in own)]
        above = [(mean if high is None else high) - mean for mean, _, high in (row[key] for row in own)]
        color = f"C{place}"
        axes.errorbar(differences, heights, xerr=[below, above], fmt="none", ecolor=color, capsize=2, label=str(cell))
        fill = ["none" if row[key].low is None else color for row in own]
        axes.scatter(differences, heights, s=16, facecolors=fill, edgecolors=color)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(order)), order)
    axes.set_xlabel("loss minus renormalized top-2, nats per token (95 % interval)")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=8)
