"""Benchmark 9: the router with its auxiliary losses and their gradients, compared with the whole layer."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.cases import DTYPES, Method, calibrate, make_layer, tokens_of
from bench.report import verdict
from bench.timing import DIRECTIONS, Passes, interleave, median_ratio, time_passes
from dynmoe.moe import MoELayer
from dynmoe.moe.statistics import weighted_sum
from dynmoe.ops.host_memory import keep_freed_memory
from harness.plans import Shape


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--width", type=int, default=1024, help="width of an expert")
    parser.add_argument("--experts", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--mean-k", type=float, default=2.0)
    parser.add_argument("--dtypes", nargs="+", default=["bf16", "fp32"], choices=sorted(DTYPES))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")


def run(given: argparse.Namespace) -> list[dict[str, Any]]:
    torch.set_num_threads(given.threads)
    keep_freed_memory()
    rows = []
    for dtype in given.dtypes:
        for experts in given.experts:
            shape = Shape(given.tokens, given.hidden, given.width, experts)
            x_TD, upstream_TD = tokens_of(shape, dtype)
            layer = make_layer(shape, dtype)
            calibrate(layer, given.mean_k, x_TD)
            whole = Method("layer", layer, layer).timed(x_TD, upstream_TD)
            times = interleave({"layer": whole, "router": _router(layer, x_TD)}, given.repeats)
            shares = {d: median_ratio(times["router"], times["layer"], d) for d in DIRECTIONS}
            rows.append({"dtype": dtype, "experts": experts, "mean_k": given.mean_k, **shares})
    return rows


def _router(layer: MoELayer, x_TD: Tensor) -> Callable[[], Passes]:
    """The router's forward and backward pass; its gates get a gradient as from the experts."""
    upstream_TE = torch.randn(len(x_TD), layer.num_experts, device=x_TD.device)

    def run() -> Passes:
        layer.zero_grad()
        leaf = x_TD.detach().requires_grad_()
        made = []

        def forward() -> Tensor:
            plan = layer.router(leaf)
            made.append(weighted_sum(layer.router.losses(plan), layer.router.loss_coefficients))
            return plan.gates_TE

        return time_passes(
            forward, lambda gates: torch.autograd.backward([gates, *made], [upstream_TE, torch.ones_like(made[0])])
        )

    return run


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    return [
        verdict(f"{row['dtype']}, E {row['experts']}: share of the layer", row["both"], 0.03)
        for row in rows
        if row["experts"] == 16
    ]
