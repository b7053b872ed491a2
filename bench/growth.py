"""Benchmark 3: growth of the layer's time with T, E and K at a fixed imbalance; log-log slopes should be 1, 0 and 1."""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from typing import Any

import torch

from bench.cases import DTYPES, Method, make_layer, tokens_of
from bench.report import verdict
from bench.timing import Passes, interleave
from dynmoe.ops.host_memory import keep_freed_memory
from harness.plans import Shape, spread_plan

_BASE = Shape()
_K = 2.0
_SERIES: dict[str, list[tuple[Shape, float]]] = {
    "T": [(Shape(tokens=tokens), _K) for tokens in (2048, 4096, 8192, 16384)],
    "E": [(Shape(experts=experts), _K) for experts in (8, 16, 32)],
    "K": [(_BASE, float(k)) for k in (1, 2, 4, 8)],
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"], choices=sorted(DTYPES))
    parser.add_argument("--imbalance", type=float, default=1.0, help="load of the busiest expert over the mean")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--scale", type=int, default=1, help="divisor of all sizes, for a quick test")


def run(given: argparse.Namespace) -> list[dict[str, Any]]:
    torch.set_num_threads(given.threads)
    keep_freed_memory()
    rows = []
    for dtype in given.dtypes:
        for letter, cases in _SERIES.items():
            methods: dict[str, Callable[[], Passes]] = {}
            for shape, mean_k in cases:
                small = Shape(
                    shape.tokens // given.scale, shape.hidden // given.scale, shape.width // given.scale, shape.experts
                )
                size = {"T": small.tokens, "E": small.experts, "K": int(mean_k)}[letter]
                layer = make_layer(small, dtype, spread_plan(small, mean_k, given.imbalance))
                methods[str(size)] = Method("dynmoe", layer, layer).timed(*tokens_of(small, dtype))
            times = interleave(methods, given.repeats)
            seconds = {int(size): statistics.median(p.of("both") for p in own) for size, own in times.items()}
            slope = _slope(seconds)
            first = min(seconds)
            rows += [
                {"dtype": dtype, "grows": letter, "size": size, "time_over_smallest": value / seconds[first],
                 "slope": slope}
                for size, value in seconds.items()
            ]  # fmt: skip
    return rows


def _slope(seconds: dict[int, float]) -> float:
    """Least-squares slope over the logarithms."""
    x = [math.log(size) for size in seconds]
    y = [math.log(value) for value in seconds.values()]
    return statistics.linear_regression(x, y).slope


def plot(rows: list[dict[str, Any]], axes: Any) -> None:
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        for letter in _SERIES:
            own = [row for row in rows if row["dtype"] == dtype and row["grows"] == letter]
            sizes = [row["size"] / own[0]["size"] for row in own]
            label = f"{letter}, {dtype}: slope {own[0]['slope']:.2f}"
            axes.loglog(sizes, [row["time_over_smallest"] for row in own], marker="o", label=label)
    axes.set(xlabel="size over the smallest", ylabel="time over that of the smallest")
    axes.legend(fontsize=7)


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    said = []
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        for letter, wanted in (("T", 1.0), ("E", 0.0), ("K", 1.0)):
            slope = next(row["slope"] for row in rows if row["dtype"] == dtype and row["grows"] == letter)
            distance = abs(slope - wanted) if wanted else slope
            said.append(verdict(f"{dtype}, slope in {letter} {slope:.3f}, distance from {wanted:g}", distance, 0.1))
    return said
