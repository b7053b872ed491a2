"""Benchmark 5: bytes saved for the backward pass compared with T·D + 2·N·F elements, and the peak of both passes.

The formula counts tokens and up projections: 2TD + 4NF bytes in bf16, twice as much in fp32. The peak of the first
passes of a step includes weight gradients, which every method keeps. In the further passes of a step with accumulation
ours adds to them where they are, and the others allocate them once more. DeepSpeed takes gradients away after each pass
in some stages, so that every pass is a first one: ZeRO 1 in bf16, and ZeRO 2.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from bench.cases import DTYPES, Method, check, make_layer, routing_facts, tokens_of
from bench.peers import same_routing_peers
from bench.report import verdict
from harness.plans import Shape, spread_plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--width", type=int, default=1024, help="width of an expert")
    parser.add_argument("--experts", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--mean-k", type=float, nargs="+", default=[1.5, 2.0, 4.0])
    parser.add_argument("--imbalance", type=float, default=2.0)
    parser.add_argument("--dtypes", nargs="+", default=["bf16", "fp32"], choices=sorted(DTYPES))


def run(given: argparse.Namespace) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    rows = []
    for dtype in given.dtypes:
        for experts in given.experts:
            for mean_k in given.mean_k:
                shape = Shape(given.tokens, given.hidden, given.width, experts)
                rows += _measure(shape, dtype, mean_k, given.imbalance)
    return rows


def _measure(shape: Shape, dtype: str, mean_k: float, imbalance: float) -> list[dict[str, Any]]:
    plan = spread_plan(shape, mean_k, imbalance)
    x_TD, upstream_TD = tokens_of(shape, dtype)
    layer = make_layer(shape, dtype, plan)
    weights = layer.experts.w_up_EHD.detach(), layer.experts.w_down_EDF.detach()
    methods = [Method("dynmoe", layer, layer), *same_routing_peers(plan, *weights)]
    check(dtype, methods, x_TD)
    num_rows = round(mean_k * shape.tokens)
    formula = (shape.tokens * shape.hidden + 2 * num_rows * shape.width) * x_TD.element_size()
    rows = []
    for method in methods:
        memory = method.memory(x_TD, upstream_TD)
        rows.append({
            "dtype": dtype, "experts": shape.experts, "mean_k": mean_k, "padding": routing_facts(plan)["padding"],
            "method": method.name, **memory, "saved_over_formula": memory["saved_bytes"] / formula,
        })  # fmt: skip
    return rows


def plot(rows: list[dict[str, Any]], axes: Any) -> None:
    first = rows[0]
    own = [row for row in rows if (row["dtype"], row["experts"]) == (first["dtype"], first["experts"])]
    for name in dict.fromkeys(row["method"] for row in own):
        line = [row for row in own if row["method"] == name]
        axes.plot(
            [r["mean_k"] for r in line], [r["saved_bytes"] / 1e6 for r in line], marker="o", label=f"{name}, saved"
        )
        axes.plot([r["mean_k"] for r in line], [r["peak_bytes"] / 1e6 for r in line], "--", label=f"{name}, peak")
    axes.set(xlabel="experts per token, mean", ylabel=f"MB, {first['dtype']}, E {first['experts']}", ylim=(0, None))
    axes.legend(fontsize=6)


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    ours = [row for row in rows if row["method"] == "dynmoe"]
    said = [verdict("saved bytes over the formula, the worst", max(row["saved_over_formula"] for row in ours), 1.1)]
    behind = []
    for row in ours:
        same = [r for r in rows if all(r[key] == row[key] for key in ("dtype", "experts", "mean_k")) and r is not row]
        behind += [f"{r['method']} ({r['dtype']}, E {r['experts']}, K̄ {r['mean_k']:g})" for r in same
                   if r["peak_bytes"] <= row["peak_bytes"]]  # fmt: skip
    return [*said, "peak below every peer: " + (f"not below {', '.join(behind)}" if behind else "yes")]
