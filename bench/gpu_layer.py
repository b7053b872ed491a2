"""The layer on a GPU: TFLOP/s and share of the measured matmul peak, our kernels compared with unfused grouped
products.

Measures from routing map to output and back, with a given plan whose busiest expert has 1.5 times the mean load. FLOPs
are the model's, 6·N·D·F forward and twice as many backward, whatever a method recomputes. The peak is that of one large
product of the same dtype in the same run; the floor, the six products that any method needs, each as one dense product.
"Waits" counts how often the host waits for the GPU in one forward and backward pass.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench.cases import DTYPES, Method, check, dense_floor, tokens_of
from bench.report import verdict
from bench.timing import Passes, interleave, median_ratio, time_passes, waits
from dynmoe.errors import UserError
from dynmoe.ops import pick_backend, routed_experts
from dynmoe.routing import RoutingPlan
from harness.plans import DEVICE, Shape, spread_plan

METHODS = ("grouped_mm", "triton", "sonic", "mxfp8")


@dataclass(frozen=True)
class Case:
    """A layer and its routing. ``goal``: target for both passes, a share of the peak or TFLOP/s."""

    tokens: int
    hidden: int
    width: int
    experts: int
    mean_k: float
    load: float = 1.5
    goal: str = ""

    @property
    def shape(self) -> Shape:
        return Shape(self.tokens, self.hidden, self.width, self.experts)

    def shrunk(self, divisor: int) -> Case:
        tokens, hidden, width = (max(8, n // divisor // 8 * 8) for n in (self.tokens, self.hidden, self.width))
        return replace(self, tokens=tokens, hidden=hidden, width=width)


CASES = [
    Case(32768, 2048, 1408, 64, 6.0, goal="0.5 share"),
    Case(16384, 1024, 2816, 16, 2.0, goal="0.6 share"),
    Case(32768, 2048, 768, 128, 8.0, goal="413 tflops"),
]
# Experts per token by load of the busiest expert over the mean.
GRID = [Case(32768, 2048, 1408, 64, k, load) for k in (1.0, 2.0, 4.0, 8.0) for load in (1.0, 2.0, 8.0)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", default="bf16", choices=sorted(DTYPES))
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--shrink", type=int, default=1, help="divisor of T, D and F, for a quick test")
    parser.add_argument("--grid", action="store_true", help="other numbers of experts per token and loads instead")
    parser.add_argument("--methods", nargs="+", default=list(METHODS[:2]), choices=METHODS)


class Experts(nn.Module):
    """Indices, dispatch, experts and combine with one backend."""

    def __init__(self, name: str, plan: RoutingPlan, w_up_EHD: Tensor, w_down_EDF: Tensor) -> None:
        super().__init__()
        self.backend = pick_backend(name, w_up_EHD.device, w_up_EHD.dtype)
        self.map_TE = plan.routing_map_TE
        self.num_rows = int(plan.routing_map_TE.sum())
        self.gates_TE = nn.Parameter(plan.gates_TE.clone())
        self.w_up_EHD = nn.Parameter(w_up_EHD)
        self.w_down_EDF = nn.Parameter(w_down_EDF)

    def forward(self, x_TD: Tensor) -> Tensor:
        permutation = self.backend.permutation(self.map_TE, self.num_rows)
        return routed_experts(x_TD, self.gates_TE, self.w_up_EHD, self.w_down_EDF, permutation, self.backend)


def weights_of(shape: Shape, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    w_up_EHD = torch.randn(shape.experts, 2 * shape.width, shape.hidden, device=DEVICE, dtype=dtype) * 0.02
    return w_up_EHD, torch.randn(shape.experts, shape.hidden, shape.width, device=DEVICE, dtype=dtype) * 0.02


def run(given: argparse.Namespace) -> list[dict[str, Any]]:
    if DEVICE.type != "cuda" and given.shrink == 1:
        raise UserError("bench gpu_layer: needs a GPU; run it on a machine with one")
    cases = [case.shrunk(given.shrink) for case in (GRID if given.grid else CASES)]
    return list(measure(cases, given.methods, given.dtype, given.repeats, 8192 // given.shrink))


def measure(
    cases: Sequence[Case], methods: Sequence[str], dtype: str, repeats: int, peak_size: int = 8192
) -> Iterator[dict[str, Any]]:
    """Yields a row for each case and method; the first method is the one that others are compared with."""
    peak = _peak(dtype, peak_size)
    for case in cases:
        yield from _measure(case, methods, dtype, repeats, peak)


def _measure(case: Case, names: Sequence[str], dtype: str, repeats: int, peak: float) -> Iterator[dict[str, Any]]:
    shape = case.shape
    plan = spread_plan(shape, case.mean_k, case.load)
    x_TD, upstream_TD = tokens_of(shape, dtype)
    weights = weights_of(shape, x_TD.dtype)
    modules = {name: Experts(name, plan, *weights) for name in names}
    methods = [Method(name, module, module) for name, module in modules.items()]
    check(dtype, methods, x_TD)
    timed = {method.name: method.timed(x_TD, upstream_TD) for method in methods}
    times = interleave({"floor": dense_floor(plan, *weights)} | timed, repeats)
    flops = 6 * round(case.mean_k * shape.tokens) * shape.hidden * shape.width
    for method in methods:
        passes = times[method.name]
        both = 3 * flops / _median(passes, "both")
        yield {
            "tokens": shape.tokens, "hidden": shape.hidden, "width": shape.width, "experts": shape.experts,
            "mean_k": case.mean_k, "load": case.load, "method": method.name,
            "forward_tflops": flops / _median(passes, "forward") / 1e12, "both_tflops": both / 1e12,
            "share_of_peak": both / peak, "over_floor": median_ratio(passes, times["floor"], "both"),
            f"over_{names[0]}": median_ratio(times[names[0]], passes, "both"),
            "waits": waits(partial(method.step, x_TD, upstream_TD)), **method.memory(x_TD, upstream_TD),
            "peak_tflops": peak / 1e12, "wanted": case.goal,
        }  # fmt: skip


def _median(passes: list[Passes], direction: str) -> float:
    return statistics.median(p.of(direction) for p in passes)


def _peak(dtype: str, size: int) -> float:
    """FLOP/s of a large product, the median of twenty."""
    a, b = torch.randn(2, size, size, device=DEVICE, dtype=DTYPES[dtype]).unbind()
    times = interleave({"product": lambda: time_passes(lambda: a @ b, lambda _: None)}, 20)["product"]
    return 2 * size**3 / _median(times, "forward")


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    said = []
    for row in (row for row in rows if row["method"] == "triton"):
        where = f"E {row['experts']}, K̄ {row['mean_k']:g}, busiest expert {row['load']:g} × the mean"
        if row["wanted"]:
            goal, kind = row["wanted"].split()
            value = row["share_of_peak"] if kind == "share" else row["both_tflops"]
            said.append(verdict(f"{where}: {goal} over the {kind} {value:.3f}", float(goal) / value, 1.0))
        if "over_grouped_mm" in row:
            said.append(verdict(f"{where}: 1.3 over the gain on grouped_mm", 1.3 / row["over_grouped_mm"], 1.0))
        said.append(verdict(f"{where}: waits for the GPU", row["waits"], 0))
    return said
