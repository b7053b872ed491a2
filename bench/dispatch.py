"""Benchmark 2: the same routing map through every layer without its experts: rows out, gates, rows back.

The unit is one copy of the routed rows and one sum over them in each direction, the minimum for rows in memory. On a
GPU our kernels do less, because their products gather the rows themselves.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bench.cases import DTYPES, FixedRouter, Method, check, routing_facts, tokens_of
from bench.peers import AutoEPLayer, FixedGate, deepspeed_layer, megatron_layer
from bench.timing import DIRECTIONS, Passes, interleave, median_ratio, time_passes
from dynmoe.ops import Permutation, gather_rows, sum_rows
from dynmoe.ops.host_memory import keep_freed_memory
from dynmoe.ops.permute import gather, scatter_sum
from dynmoe.routing import RoutingPlan
from harness.plans import Shape, spread_plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--experts", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--mean-k", type=float, default=2.0)
    parser.add_argument("--imbalance", type=float, default=2.0)
    parser.add_argument("--dtypes", nargs="+", default=["bf16", "fp32"], choices=sorted(DTYPES))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")


class _Ours(nn.Module):
    """The row operations of our layer in separate calls, with the gates applied to the rows."""

    def __init__(self, plan: RoutingPlan) -> None:
        super().__init__()
        self.router = FixedRouter(plan)

    def forward(self, x_TD: Tensor) -> Tensor:
        plan = self.router(x_TD)
        permutation = Permutation.of(plan.routing_map_TE)
        gates_N = permutation.of_rows(plan.gates_TE)
        return sum_rows(gather_rows(x_TD, permutation) * gates_N.to(x_TD.dtype).unsqueeze(1), permutation)


class _Identity(nn.Module):
    """A stand-in for experts that returns its rows."""

    def forward(self, x: Tensor, *_: object) -> Any:
        return x


class _MegatronIdentity(nn.Module):
    """A stand-in for Megatron's experts, which apply the gates."""

    def forward(self, x: Tensor, _: Tensor, probs: Tensor) -> tuple[Tensor, None]:
        return x * probs.unsqueeze(-1).to(x.dtype), None


def run(given: argparse.Namespace) -> list[dict[str, Any]]:
    torch.set_num_threads(given.threads)
    keep_freed_memory()
    rows = []
    for dtype in given.dtypes:
        for experts in given.experts:
            shape = Shape(given.tokens, given.hidden, 8, experts)
            rows += _measure(shape, dtype, given.mean_k, given.imbalance, given.repeats)
    return rows


def _measure(shape: Shape, dtype: str, mean_k: float, imbalance: float, repeats: int) -> list[dict[str, Any]]:
    plan = spread_plan(shape, mean_k, imbalance)
    x_TD, upstream_TD = tokens_of(shape, dtype)
    w_up = x_TD.new_zeros(shape.experts, 2 * shape.width, shape.hidden)
    w_down = x_TD.new_zeros(shape.experts, shape.hidden, shape.width)
    ours = _Ours(plan).to(x_TD.device)
    padded = deepspeed_layer(FixedGate(plan), w_up, w_down).to(x_TD.device)
    padded.experts = _Identity()
    plain = AutoEPLayer(plan, w_up, w_down).to(x_TD.device)
    plain.experts = _Identity()
    megatron = megatron_layer(plan, w_up, w_down)
    megatron.experts = _MegatronIdentity()
    methods = [
        Method("dynmoe", ours, ours), Method("deepspeed_moe", padded, lambda x: padded(x, None)),
        Method("gather_and_index_add", plain, plain),
        Method("megatron_moe", megatron, lambda x: megatron(x.unsqueeze(1))[0].squeeze(1)),
    ]  # fmt: skip
    check(dtype, methods, x_TD)
    runs: dict[str, Callable[[], Passes]] = {"unit": _unit(plan, x_TD, upstream_TD)}
    times = interleave(runs | {method.name: method.timed(x_TD, upstream_TD) for method in methods}, repeats)
    facts = {"dtype": dtype, "experts": shape.experts, **routing_facts(plan)}
    return [
        facts | {"method": m.name, **{d: median_ratio(times[m.name], times["unit"], d) for d in DIRECTIONS}}
        for m in methods
    ]


def _unit(plan: RoutingPlan, x_TD: Tensor, upstream_TD: Tensor) -> Callable[[], Passes]:
    permutation = Permutation.of(plan.routing_map_TE)
    return lambda: time_passes(
        lambda: scatter_sum(gather(x_TD, permutation), permutation),
        lambda _: scatter_sum(gather(upstream_TD, permutation), permutation),
    )


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    best: dict[tuple[str, int], list[tuple[float, str]]] = {}
    for row in rows:
        key = (row["dtype"], row["experts"])
        best.setdefault(key, []).append((row["both"], row["method"]))
    return [
        f"{dtype}, E {experts}: " + ", ".join(f"{name} {value:.2f}" for value, name in sorted(methods))
        for (dtype, experts), methods in best.items()
    ]
