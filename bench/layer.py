"""Benchmark 1: the MoE layer at equal activated FLOPs, against the dense floor and DeepSpeed's own layer.

The floor is what cannot be saved: the six dense matrix products (gate and up projection as one, down projection;
forward, and the two gradients of each in the backward pass) over the N routed rows, in the same turn. Ours runs whole,
its own top-p router and auxiliary losses included; DeepSpeed's layer gets our routing for free, and once its own
top-2 gate.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.peers import FixedGate, deepspeed_layer, deepspeed_top2_gate
from bench.timing import DIRECTIONS, Passes, interleave, median_ratio, peak_bytes, saved_bytes, time_passes
from dynmoe.config import load_config
from dynmoe.moe import MoEContext, MoELayer
from dynmoe.moe.routers.softmax import TopPRouter
from dynmoe.ops.host_memory import keep_freed_memory
from dynmoe.routing import RoutingPlan, top_p

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
TOLERANCE = {"bf16": 3e-2, "fp32": 1e-5}


@dataclass(frozen=True)
class Shape:
    tokens: int = 4096
    hidden: int = 512
    width: int = 1024
    experts: int = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--width", type=int, default=1024, help="of one expert")
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--mean-k", type=float, nargs="+", default=[1.5, 2.0, 4.0, 6.0])
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
            rows += _measure(shape, dtype, mean_k, given.repeats)
    return rows


def _calibrated_layer(shape: Shape, mean_k: float, x_TD: Tensor) -> MoELayer:
    """Our layer with a random router, and the p at which it gives ``mean_k`` experts per token on ``x_TD``."""
    overrides = [
        f"model.hidden={shape.hidden}", "model.heads=1", "model.kv_heads=1", f"model.moe.experts={shape.experts}",
        f"model.moe.expert_hidden={shape.width}", "model.router.kind=top_p",
    ]  # fmt: skip
    model = load_config(None, overrides).model
    layer = MoELayer(model, 0, 0, MoEContext())
    assert isinstance(layer.router, TopPRouter)
    with torch.no_grad():
        layer.router.weight_ED.normal_(0.0, 2.0 / shape.hidden**0.5)
        logits_TE = x_TD.cpu().float() @ layer.router.weight_ED.t()
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        mean = top_p(logits_TE, middle).experts_per_token_T.float().mean().item()
        low, high = (middle, high) if mean < mean_k else (low, middle)
    layer.router.p.fill_(high)
    return layer


def _measure(shape: Shape, dtype: str, mean_k: float, repeats: int) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    x_TD = torch.randn(shape.tokens, shape.hidden, device=device, dtype=DTYPES[dtype])
    upstream_TD = torch.randn_like(x_TD)
    layer = _calibrated_layer(shape, mean_k, x_TD).to(device, DTYPES[dtype])
    with torch.no_grad():
        plan = layer.router(x_TD)
    weights = layer.experts.w_up_EHD.detach(), layer.experts.w_down_EDF.detach()
    same = deepspeed_layer(FixedGate(plan), *weights).to(device, DTYPES[dtype])
    own = deepspeed_layer(deepspeed_top2_gate(shape.hidden, shape.experts), *weights).to(device, DTYPES[dtype])
    _check(dtype, layer, same, x_TD)

    forwards: dict[str, tuple[nn.Module, Callable[[Tensor], Tensor]]] = {
        "dynmoe": (layer, layer),
        "deepspeed_same_routing": (same, lambda x: same(x, None)),
        "deepspeed_top2": (own, lambda x: own(x, None)),
    }
    methods: dict[str, Callable[[], Passes]] = {"dense_floor": _floor(plan, *weights, DTYPES[dtype])}
    for name, (module, forward) in forwards.items():
        methods[name] = _timed(module, forward, x_TD, upstream_TD)
    times = interleave(methods, repeats)

    rows = []
    facts = _facts(plan, shape, dtype)
    for name in methods:
        memory = {}
        if name in forwards:
            module, forward = forwards[name]
            memory = _memory(module, forward, x_TD, upstream_TD)
        for direction in DIRECTIONS:
            ratio = median_ratio(times[name], times["dense_floor"], direction)
            rows.append(facts | {"method": name, "direction": direction, "ratio_to_floor": round(ratio, 4)} | memory)
    return rows


def _timed(module: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor, upstream: Tensor) -> Callable[[], Passes]:
    def run() -> Passes:
        module.zero_grad()
        leaf = x.detach().requires_grad_()
        return time_passes(lambda: forward(leaf), lambda y: y.backward(upstream))

    return run


def _memory(module: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor, upstream: Tensor) -> dict[str, int]:
    def step() -> None:
        forward(x.detach().requires_grad_()).backward(upstream)

    module.zero_grad()
    saved = saved_bytes(lambda: forward(x.detach().requires_grad_()), module)
    step()  # gradients exist: what remains is the pass itself
    return {"saved_bytes": saved, "peak_bytes": peak_bytes(step)}


def _floor(plan: RoutingPlan, w_up_EHD: Tensor, w_down_EDF: Tensor, dtype: torch.dtype) -> Callable[[], Passes]:
    num_rows, (w_up_HD, w_down_DF) = int(plan.routing_map_TE.sum()), (w_up_EHD[0], w_down_EDF[0])
    x_ND, h_NH, a_NF = (
        torch.randn(num_rows, width, device=w_up_HD.device, dtype=dtype)
        for width in (w_up_HD.shape[1], w_up_HD.shape[0], w_down_DF.shape[1])
    )
    grad_ND = torch.randn_like(x_ND)

    def forward() -> Tensor:
        x_ND @ w_up_HD.t()
        return a_NF @ w_down_DF.t()

    def backward(_: Tensor) -> None:
        grad_ND @ w_down_DF, grad_ND.t() @ a_NF, h_NH @ w_up_HD, h_NH.t() @ x_ND

    return lambda: time_passes(forward, backward)


@torch.no_grad()
def _check(dtype: str, layer: MoELayer, peer: nn.Module, x: Tensor) -> None:
    """Correctness first: with the same routing the output is that of DeepSpeed's layer."""
    results = [layer(x).float(), peer(x, None).float()]
    error = ((results[0] - results[1]).norm() / results[1].norm()).item()
    verdict = "agrees" if error <= TOLERANCE[dtype] else "DIFFERS"
    print(f"{dtype}: our output {verdict} with DeepSpeed's under the same routing (relative error {error:.1e})")
    if error > TOLERANCE[dtype]:
        raise SystemExit(f"bench layer: wrong output in {dtype}; the timings would mean nothing")


def _facts(plan: RoutingPlan, shape: Shape, dtype: str) -> dict[str, Any]:
    experts_T, load_E = plan.experts_per_token_T.float(), plan.tokens_per_expert_E.float()
    return {
        "benchmark": "layer",
        "dtype": dtype,
        "mean_k": round(experts_T.mean().item(), 3),
        "std_k": round(experts_T.std().item(), 3),
        "load_max_over_mean": round((load_E.max() / load_E.mean()).item(), 3),
        "padding_of_padded_layers": round((load_E.max() * shape.experts / load_E.sum()).item(), 3),
        "tokens": shape.tokens,
        "hidden": shape.hidden,
        "width": shape.width,
        "experts": shape.experts,
    }
