"""Benchmark 1: the MoE layer at equal activated FLOPs, against the dense floor and the layers of others.

The floor is what cannot be saved: the six dense matrix products (gate and up projection as one, down projection;
forward, and the two gradients of each in the backward pass) over the N routed rows, in the same turn. Ours runs whole,
its own top-p router and auxiliary losses included; the others get our routing for free, and DeepSpeed's layer once its
own top-2 gate.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.cases import DTYPES, Method, Shape, calibrate, dense_floor, make_layer, routing_facts, spread_plan, tokens_of
from bench.peers import own_routing_peer, same_routing_peers
from bench.report import verdict
from bench.timing import DIRECTIONS, Passes, interleave, median_ratio
from dynmoe.ops.host_memory import keep_freed_memory

TOLERANCE = {"bf16": 3e-2, "fp32": 1e-5}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--width", type=int, default=1024, help="of one expert")
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--mean-k", type=float, nargs="+", default=[1.5, 2.0, 4.0, 6.0])
    parser.add_argument("--imbalance", type=float, help="give ours too a plan, whose busiest expert has so many times "
                        "the mean load; without it our own router makes the plan")  # fmt: skip
    parser.add_argument("--dtypes", nargs="+", default=["bf16", "fp32"], choices=sorted(DTYPES))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")


def run(given: argparse.Namespace) -> list[dict[str, Any]]:
    torch.set_num_threads(given.threads)
    keep_freed_memory()
    shape = Shape(given.tokens, given.hidden, given.width, given.experts)
    rows: list[dict[str, Any]] = []
    for dtype in given.dtypes:
        for mean_k in given.mean_k:
            rows += _measure(shape, dtype, mean_k, given.imbalance, given.repeats)
    return rows


def _measure(shape: Shape, dtype: str, mean_k: float, imbalance: float | None, repeats: int) -> list[dict[str, Any]]:
    x_TD, upstream_TD = tokens_of(shape, dtype)
    if imbalance is None:
        layer = make_layer(shape, dtype)
        calibrate(layer, mean_k, x_TD)
        with torch.no_grad():
            plan = layer.eval().router(x_TD)
        layer.train()
    else:
        plan = spread_plan(shape, mean_k, imbalance)
        layer = make_layer(shape, dtype, plan)
    weights = layer.experts.w_up_EHD.detach(), layer.experts.w_down_EDF.detach()
    methods = [Method("dynmoe", layer, layer), *same_routing_peers(plan, *weights)]
    check(dtype, methods, x_TD)
    methods.append(own_routing_peer(shape.hidden, *weights))

    runs: dict[str, Callable[[], Passes]] = {"dense_floor": dense_floor(plan, *weights)}
    times = interleave(runs | {method.name: method.timed(x_TD, upstream_TD) for method in methods}, repeats)
    facts = {"dtype": dtype, **routing_facts(plan), "tokens": shape.tokens, "hidden": shape.hidden,
             "width": shape.width, "experts": shape.experts}  # fmt: skip
    rows = []
    for method in methods:
        ratios = {d: median_ratio(times[method.name], times["dense_floor"], d) for d in DIRECTIONS}
        rows.append(facts | {"method": method.name, **ratios, **method.memory(x_TD, upstream_TD)})
    return rows


@torch.no_grad()
def check(dtype: str, methods: Sequence[Method], x_TD: Tensor) -> None:
    """Correctness first: with the same routing every output is that of the first method.

    Raises:
        SystemExit: naming the method whose output differs.
    """
    expected = methods[0].forward(x_TD).float()
    for method in methods[1:]:
        error = ((method.forward(x_TD).float() - expected).norm() / expected.norm()).item()
        if not error <= TOLERANCE[dtype]:
            raise SystemExit(f"{dtype}: {method.name} differs from {methods[0].name} by {error:.1e}; no timings")
    names = ", ".join(method.name for method in methods[1:])
    print(f"{dtype}: the output agrees with that of {names} under the same routing")


def plot(rows: list[dict[str, Any]], axes: Any) -> None:
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        for name in dict.fromkeys(row["method"] for row in rows):
            own = [row for row in rows if row["dtype"] == dtype and row["method"] == name]
            style = "-" if dtype == "bf16" else "--"
            axes.plot([r["mean_k"] for r in own], [r["both"] for r in own], style, marker="o", label=f"{name}, {dtype}")
    axes.set(xlabel="experts per token, mean", ylabel="forward + backward, × dense floor", ylim=(0.9, None))
    axes.axhline(1.0, color="gray", linewidth=0.8)
    axes.legend(fontsize=7)


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    """What was asked for, against what was measured."""
    said = []
    limits = {"fp32": 1.10, "bf16": 1.25}
    for row in rows:
        if row["method"] == "dynmoe" and row["mean_k"] < 5:
            limit = limits[row["dtype"]]
            said.append(verdict(f"{row['dtype']}, K̄ {row['mean_k']:g}: × the floor", row["both"], limit))
    for key in ("both", "peak_bytes", "saved_bytes"):
        behind = [_where(row) for row in rows if row["method"] != "dynmoe" and row[key] <= _ours(rows, row)[key]
                  and not (row["method"] == "deepspeed_top2" and row["mean_k"] != 2.0)]  # fmt: skip
        said.append(f"ahead of every peer in `{key}`: " + (f"not of {', '.join(behind)}" if behind else "yes"))
    return said


def _ours(rows: list[dict[str, Any]], like: dict[str, Any]) -> dict[str, Any]:
    same = ("dtype", "mean_k", "experts")
    return next(row for row in rows if row["method"] == "dynmoe" and all(row[key] == like[key] for key in same))


def _where(row: dict[str, Any]) -> str:
    return f"{row['method']} ({row['dtype']}, K̄ {row['mean_k']:g})"
