"""Benchmark 12: the layer on few tokens, as in generation, compared with a loop over the chosen experts.

Same router, same weights, no gradient; top-p is set to about two experts per token. The loop is that of Mixtral and
similar models in transformers: for each expert, select its tokens, compute two products, add to the output.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import calibrate, make_layer, tokens_of
from bench.report import Rows, verdict
from dynmoe.moe import MoELayer
from harness.plans import DEVICE, Shape

_SHAPES = (Shape(128, 128, 128, 16), Shape(128, 512, 1024, 16), Shape(128, 1024, 2816, 16))
_MEAN_K = 2.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=int, nargs="*", default=[1, 2, 4, 8, 32])
    parser.add_argument("--dtypes", nargs="*", default=["fp32", "bf16"], choices=("fp32", "bf16"))
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")


def loop(layer: MoELayer, x_TD: Tensor) -> Tensor:
    """The layer's output, computed by a loop over experts."""
    plan = layer.router(x_TD)
    experts = layer.experts
    y_TD = torch.zeros_like(x_TD)
    for expert in plan.routing_map_TE.any(dim=0).nonzero().flatten().tolist():
        tokens_N = plan.routing_map_TE[:, expert].nonzero().flatten()
        gate_NF, up_NF = F.linear(x_TD[tokens_N], experts.w_up_EHD[expert]).chunk(2, dim=-1)
        weight_N1 = plan.gates_TE[tokens_N, expert, None].to(x_TD.dtype)
        y_TD.index_add_(0, tokens_N, F.linear(F.silu(gate_NF) * up_NF * weight_N1, experts.w_down_EDF[expert]))
    return y_TD


def run(given: argparse.Namespace) -> Rows:
    torch.set_num_threads(given.threads)
    return [
        _row(shape, dtype, tokens, given.rounds)
        for shape in _SHAPES
        for dtype in given.dtypes
        for tokens in given.tokens
    ]


@torch.inference_mode()
def _row(shape: Shape, dtype: str, tokens: int, rounds: int) -> dict[str, object]:
    layer = make_layer(shape, dtype).eval()
    x_TD, _ = tokens_of(shape, dtype)
    calibrate(layer, _MEAN_K, x_TD)
    methods: dict[str, Callable[[Tensor], Tensor]] = {"packed": layer, "loop": lambda x: loop(layer, x)}
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    torch.testing.assert_close(layer(x_TD), loop(layer, x_TD), rtol=2e-2, atol=2e-2)
    for number in range(rounds):
        some_TD = x_TD[[(number * tokens + n) % len(x_TD) for n in range(tokens)]]
        for name in random.sample(list(methods), len(methods)):  # the second method finds the weights in the cache
            start = time.perf_counter()
            methods[name](some_TD)
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    packed, looped = (statistics.median(seconds[name]) for name in methods)
    return {
        "hidden": shape.hidden, "width": shape.width, "experts": shape.experts, "dtype": dtype, "tokens": tokens,
        "packed / loop": packed / looped,
    }  # fmt: skip


def verdicts(rows: Rows) -> list[str]:
    worst = max(rows, key=lambda row: row["packed / loop"])
    mean = statistics.geometric_mean(row["packed / loop"] for row in rows)
    case = f"{worst['tokens']} token(s), {worst['hidden']} x {worst['width']}, {worst['dtype']}"
    return [
        verdict("packed layer against the loop, geometric mean", mean, 1.0),
        verdict(f"packed layer against the loop, worst ({case})", worst["packed / loop"], 1.0),
    ]
