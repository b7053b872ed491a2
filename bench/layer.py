"""Benchmark 1: the MoE layer at equal activated FLOPs, compared with the dense floor and other projects' layers.

The floor is the unavoidable work: the six dense matrix products (gate and up projection as one, down projection;
forward, and the two gradients of each in the backward pass) over the N routed rows, in the same turn. "dynmoe" is our
whole layer with its own top-p router and auxiliary losses. The other layers are given its routing, and so is ours once,
for a like-for-like comparison (deepspeed_autoep is AutoEP's grouped experts between a gather and an index_add).
DeepSpeed's layer also runs with its own top-2 gate. The last rows have many experts and a busy one. A CPU without
instructions for bf16 emulates its products, which then take so long that ratios in bf16 say nothing about other CPUs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch

from bench.cases import DTYPES, Method, calibrate, check, dense_floor, make_layer, routing_facts, tokens_of
from bench.peers import own_routing_peer, same_routing_peers
from bench.report import verdict
from bench.timing import DIRECTIONS, Passes, interleave, median_ratio
from dynmoe.moe import MoELayer
from dynmoe.ops.host_memory import keep_freed_memory
from dynmoe.routing import RoutingPlan
from harness.plans import Shape, spread_plan

# Of our whole layer, by the mean of K.
_OVER_FLOOR = {"bf16": {1.5: 1.18, 2.0: 1.15, 4.0: 1.10}, "fp32": {1.5: 1.05, 2.0: 1.05, 4.0: 1.03}}
_OVER_AUTOEP = 0.97


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--width", type=int, default=1024, help="width of an expert")
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--mean-k", type=float, nargs="+", default=[1.5, 2.0, 4.0, 6.0])
    skewed = "more cases with a given plan: experts, mean K, load of the busiest expert over the mean"
    parser.add_argument("--skewed", nargs="*", default=["64:2:3.5"], metavar="E:K:LOAD", help=skewed)
    parser.add_argument("--dtypes", nargs="+", default=["bf16", "fp32"], choices=sorted(DTYPES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")


def run(given: argparse.Namespace) -> list[dict[str, Any]]:
    torch.set_num_threads(given.threads)
    keep_freed_memory()
    sizes = given.tokens, given.hidden, given.width
    rows: list[dict[str, Any]] = []
    for dtype in given.dtypes:
        for mean_k in given.mean_k:
            shape = Shape(*sizes, given.experts)
            x_TD, _ = tokens_of(shape, dtype)
            layer = make_layer(shape, dtype)
            calibrate(layer, mean_k, x_TD)
            with torch.no_grad():
                plan = layer.eval().router(x_TD)
            rows += _measure(shape, dtype, plan, given.repeats, layer.train())
        for case in given.skewed:
            experts, mean_k, load = case.split(":")
            shape = Shape(*sizes, int(experts))
            rows += _measure(shape, dtype, spread_plan(shape, float(mean_k), float(load)), given.repeats)
    return rows


def _measure(
    shape: Shape, dtype: str, plan: RoutingPlan, repeats: int, whole: MoELayer | None = None
) -> list[dict[str, Any]]:
    x_TD, upstream_TD = tokens_of(shape, dtype)
    layer = make_layer(shape, dtype, plan)
    weights = layer.experts.w_up_EHD.detach(), layer.experts.w_down_EDF.detach()
    methods = [Method("dynmoe_given_routing", layer, layer), *same_routing_peers(plan, *weights)]
    whole_layer = [] if whole is None else [Method("dynmoe", whole, whole)]
    check(dtype, [*methods, *whole_layer], x_TD)
    methods = [*whole_layer, *methods, own_routing_peer(shape.hidden, *weights)]

    runs: dict[str, Callable[[], Passes]] = {"dense_floor": dense_floor(plan, *weights)}
    times = interleave(runs | {method.name: method.timed(x_TD, upstream_TD) for method in methods}, repeats)
    facts = {"dtype": dtype, "experts": shape.experts, **routing_facts(plan), "tokens": shape.tokens,
             "hidden": shape.hidden, "width": shape.width}  # fmt: skip
    rows = []
    for method in methods:
        ratios = {d: median_ratio(times[method.name], times["dense_floor"], d) for d in DIRECTIONS}
        rows.append(facts | {"method": method.name, **ratios, **method.memory(x_TD, upstream_TD)})
    return rows


def plot(rows: list[dict[str, Any]], axes: Any) -> None:
    few = min(row["experts"] for row in rows)
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        for number, name in enumerate(dict.fromkeys(row["method"] for row in rows)):
            own = [row for row in rows if (row["dtype"], row["method"], row["experts"]) == (dtype, name, few)]
            if name == "deepspeed_top2":  # other FLOPs at another K
                own = [row for row in own if abs(row["mean_k"] - 2.0) < 0.01]
            x = [r["mean_k"] for r in own]
            y = [r["both"] for r in own]
            style = "-" if dtype == "bf16" else "--"
            axes.plot(x, y, style, color=f"C{number}", marker="o", label=f"{name}, {dtype}")
    axes.set(xlabel="experts per token, mean", ylabel="forward + backward, × dense floor", ylim=(0.9, None))
    axes.axhline(1.0, color="gray", linewidth=0.8)
    axes.legend(fontsize=7)


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    """Compares the measurements with the targets."""
    said = []
    for row in rows:
        limit = _OVER_FLOOR[row["dtype"]].get(round(2 * row["mean_k"]) / 2)
        if row["method"] == "dynmoe" and limit is not None:
            said.append(verdict(f"{row['dtype']}, K̄ {row['mean_k']:g}: × the floor", row["both"], limit))
        if row["method"] == "dynmoe_given_routing" and row["padding"] > 3 and row["dtype"] == "bf16":
            said.append(verdict(f"bf16, E {row['experts']} with skew: × the floor", row["both"], 1.5))
    pairs = [(_ours(row, rows), row) for row in rows if row["method"] == "deepspeed_autoep"]
    over = [own["both"] / peer["both"] for own, peer in pairs if own is not None]
    if over:
        said.append(verdict("time over AutoEP's experts with the same routing, the worst row", max(over), _OVER_AUTOEP))
    for key in ("both", "peak_bytes", "saved_bytes"):
        behind = [_where(row) for row in rows if not row["method"].startswith("dynmoe") and _beats(row, rows, key)]
        said.append(f"ahead of every peer in `{key}`: " + (f"not of {', '.join(behind)}" if behind else "yes"))
    return said


def _beats(peer: dict[str, Any], rows: list[dict[str, Any]], key: str) -> bool:
    fixed_k = peer["method"] == "deepspeed_top2" and abs(peer["mean_k"] - 2.0) > 0.01  # other FLOPs
    own = _ours(peer, rows)
    return own is not None and not fixed_k and peer[key] <= own[key]


def _ours(peer: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Our row to compare with a peer's: with given routing if the peer has it, else the whole layer, if it was run."""
    name = "dynmoe" if peer["method"] == "deepspeed_top2" else "dynmoe_given_routing"
    same = ("dtype", "mean_k", "padding", "experts")
    return next((r for r in rows if r["method"] == name and all(r[k] == peer[k] for k in same)), None)


def _where(row: dict[str, Any]) -> str:
    return f"{row['method']} ({row['dtype']}, E {row['experts']}, K̄ {row['mean_k']:g}: {row['both']:.3f})"
