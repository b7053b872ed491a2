"""Benchmark 13: collectives and host reads per step, on two ranks.

The configuration has the most collectives: a budget held over all layers, and a balance over the global batch. A step
has two micro-batches. "ours" is what our code calls in compute_gradients, update and, on logged steps, report; "engine"
is what DeepSpeed and Megatron-Core call there. Transfers of activations are not counted: sends between pipeline stages,
and tokens sent to experts on other ranks. A host read is an item(), tolist(), cpu(), bool(), int() or float() of a
tensor. Each would wait for a GPU, except the second one of a report, which reads a finished value. Also not counted:
host reads of code that only runs on a CPU, and the row count for which a layer without a limit waits (`python -m bench
launches`, on a GPU).

Counts are per step, of the rank with more. Before collectives were packed, "ours" was, for 2 and for 8 layers: with
data parallelism 6 and 18 collectives in a plain step, and 3 and 9 host reads (8 and 20 in a logged step); with pipeline
parallelism 3 collectives, and 10 and 13 host reads (14 and 20 in a logged step).
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from bench.report import verdict
from harness.collectives import LAYOUTS, count_steps
from harness.processes import CPU, join_ranks


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--where", action="store_true", help="print the calling functions")


def run(given: argparse.Namespace) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_serve, (folder, given.layers), nprocs=2)
        ranks = [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(2)]
    rows = []
    for layout, layers in ranks[0]:
        for step in ("plain", "logged"):
            counts = max((own[layout, layers][step] for own in ranks), key=Counter.total)
            row: dict[str, Any] = {"layout": layout, "step": step, "layers": layers}
            for column in (("collectives", "ours"), ("collectives", "engine"), ("host_reads", "ours"),
                           ("host_reads", "engine")):  # fmt: skip
                row[", ".join(column)] = sum(count for key, count in counts.items() if key[:2] == column)
            rows.append(row)
            if given.where:
                print(layout, layers, step, *(f"{count} {' '.join(key)}" for key, count in counts.items()), sep="\n  ")
    return rows


def _serve(rank: int, folder: str, layers: list[int]) -> None:
    """Runs on each rank: counts every case, and writes the counts to ``folder``."""
    os.environ |= CPU
    torch.set_num_threads(1)
    join_ranks(rank, 2, Path(folder))
    made = {(layout, number): count_steps(layout, number) for layout in LAYOUTS for number in layers}
    torch.save(made, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    said = []
    for layout in LAYOUTS:
        for step in ("plain", "logged"):
            own = [row for row in rows if (row["layout"], row["step"]) == (layout, step)]
            totals = [sum(value for name, value in row.items() if ", " in name) for row in own]
            grown = max(totals) - min(totals)
            said.append(verdict(f"{layout}, {step} step: counts that grow with the number of layers", grown, 0))
    return said
