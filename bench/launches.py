"""Benchmark 6, on a GPU: device synchronizations and kernel launches of one layer in steady state."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench.cases import calibrate, make_layer, tokens_of
from bench.report import verdict
from bench.timing import waits
from dynmoe.errors import UserError
from harness.plans import DEVICE, Shape

# Functions of dynmoe.ops.triton, as named by the profiler.
_OURS = {
    "_count_kernel", "_fill_kernel", "_up_kernel", "_rows_kernel", "_sum_rows_kernel", "_activation_gradient_kernel",
    "_gate_gradient_kernel", "_weights_kernel",
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--width", type=int, default=2816, help="width of an expert")
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--mean-k", type=float, default=2.0)


def run(given: argparse.Namespace) -> list[dict[str, Any]]:
    if DEVICE.type != "cuda":
        raise UserError("bench launches: needs a GPU; run it on a machine with one")
    shape = Shape(given.tokens, given.hidden, given.width, given.experts)
    x_TD, upstream_TD = tokens_of(shape, "bf16")
    rows = []
    for limit in (None, given.mean_k * 1.25):
        layer = make_layer(shape, "bf16")
        calibrate(layer, given.mean_k, x_TD)
        layer.settings.max_mean_experts_per_token = limit
        layer.settings.on_overflow = "drop"

        def step(layer: torch.nn.Module = layer) -> None:
            layer(x_TD.detach().requires_grad_()).backward(upstream_TD)

        for _ in range(3):
            step()
        rows.append({"limit": limit or "none", "waits": waits(step), **_launches(step)})
    return rows


def _launches(step: Any) -> dict[str, int]:
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        step()
        torch.cuda.synchronize()
    names = [event.name for event in trace.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    kernels = [name for name in names if not name.startswith(("Memcpy", "Memset"))]
    return {"kernels": len(kernels), "ours": sum(name in _OURS for name in kernels)}


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    return [verdict(f"waits with limit {row['limit']}", row["waits"], 0 if row["limit"] != "none" else 1)
            for row in rows]  # fmt: skip
