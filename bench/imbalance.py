"""Benchmark 4: one expert with 1 to 8 times the mean load and the same number of routed rows; ours should be flat."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from bench.cases import DTYPES, Method, check, dense_floor, make_layer, routing_facts, tokens_of
from bench.peers import same_routing_peers
from bench.report import verdict
from bench.timing import interleave, median_ratio
from dynmoe.ops.host_memory import keep_freed_memory
from harness.plans import Shape, spread_plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--width", type=int, default=1024, help="width of an expert")
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--mean-k", type=float, default=2.0)
    parser.add_argument("--imbalances", type=float, nargs="+", default=[1.0, 2.0, 4.0, 8.0])
    parser.add_argument("--dtypes", nargs="+", default=["bf16"], choices=sorted(DTYPES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")


def run(given: argparse.Namespace) -> list[dict[str, Any]]:
    torch.set_num_threads(given.threads)
    keep_freed_memory()
    shape = Shape(given.tokens, given.hidden, given.width, given.experts)
    rows = []
    for dtype in given.dtypes:
        x_TD, upstream_TD = tokens_of(shape, dtype)
        plans = {imbalance: spread_plan(shape, given.mean_k, imbalance) for imbalance in given.imbalances}
        runs = {}
        floors = {}
        for imbalance, plan in plans.items():
            layer = make_layer(shape, dtype, plan)
            weights = layer.experts.w_up_EHD.detach(), layer.experts.w_down_EDF.detach()
            methods = [Method("dynmoe", layer, layer), *same_routing_peers(plan, *weights)]
            check(dtype, methods, x_TD)
            floors[imbalance] = f"floor {imbalance}"
            runs[floors[imbalance]] = dense_floor(plan, *weights)
            runs |= {f"{method.name} {imbalance}": method.timed(x_TD, upstream_TD) for method in methods}
        times = interleave(runs, given.repeats)
        names = [method.name for method in methods]
        first = given.imbalances[0]
        for name in names:
            for imbalance, plan in plans.items():
                own = times[f"{name} {imbalance}"]
                rows.append({
                    "dtype": dtype, "method": name, "load_max_over_mean": imbalance,
                    "padding": routing_facts(plan)["padding"],
                    "both": median_ratio(own, times[floors[imbalance]], "both"),
                    "over_balanced": median_ratio(own, times[f"{name} {first}"], "both"),
                })  # fmt: skip
    return rows


def plot(rows: list[dict[str, Any]], axes: Any) -> None:
    for name in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == name and row["dtype"] == rows[0]["dtype"]]
        axes.plot([r["load_max_over_mean"] for r in own], [r["over_balanced"] for r in own], marker="o", label=name)
    axes.set(xlabel="load of the busiest expert over the mean", ylabel="time over that of balanced experts")
    axes.legend(fontsize=7)


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    worst = max((row for row in rows if row["method"] == "dynmoe"), key=lambda row: row["load_max_over_mean"])
    return [verdict(f"imbalance {worst['load_max_over_mean']:g}: × the balanced time", worst["over_balanced"], 1.1)]
