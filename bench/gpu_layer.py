"""The layer on a GPU: TFLOP/s and share of the measured matmul peak, our kernels compared with unfused grouped
products.

Measures from routing map to output and back, with a given plan whose busiest expert has 1.5 times the mean load. FLOPs
are the model's, 6·N·D·F forward and twice as many backward, whatever a method recomputes. The peak is that of one large
product of the same dtype in the same run. --tune tries other tile sizes and prints the fastest.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bench.cases import DTYPES, Method, tokens_of
from bench.layer import check
from bench.report import verdict
from bench.timing import Passes, interleave, time_passes
from dynmoe.errors import UserError
from dynmoe.ops import pick_backend, routed_experts
from dynmoe.ops.triton import backend as kernels
from dynmoe.ops.triton.gemm import Tiles
from dynmoe.routing import RoutingPlan
from harness.plans import DEVICE, Shape, spread_plan

# T, D, F, E, K, and the target for forward + backward: a share of the peak, or TFLOP/s.
_CASES: list[Any] = [
    (32768, 2048, 1408, 64, 6.0, "share", 0.45),
    (16384, 1024, 2816, 16, 2.0, "share", 0.50),
    (32768, 2048, 768, 128, 8.0, "tflops", 413.0),
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", default="bf16", choices=sorted(DTYPES))
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--shrink", type=int, default=1, help="divisor of T, D and F, for a quick test")
    parser.add_argument("--tune", action="store_true", help="try tile sizes; takes minutes")


class _Experts(nn.Module):
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


def run(given: argparse.Namespace) -> list[dict[str, Any]]:
    if DEVICE.type != "cuda" and given.shrink == 1:
        raise UserError("bench gpu_layer: needs a GPU; run it on a machine with one")
    peak = _peak(given.dtype, 8192 // given.shrink)
    rows = []
    for *sizes, experts, mean_k, kind, goal in _CASES:
        tokens, hidden, width = (max(8, size // given.shrink // 8 * 8) for size in sizes)
        shape = Shape(tokens, hidden, width, experts)
        plan = spread_plan(shape, mean_k, imbalance=1.5)
        x_TD, upstream_TD = tokens_of(shape, given.dtype)
        w_up = torch.randn(experts, 2 * shape.width, shape.hidden, device=DEVICE, dtype=x_TD.dtype) * 0.02
        w_down = torch.randn(experts, shape.hidden, shape.width, device=DEVICE, dtype=x_TD.dtype) * 0.02
        modules = {name: _Experts(name, plan, w_up, w_down) for name in ("grouped_mm", "triton")}
        methods = [Method(name, module, module) for name, module in modules.items()]
        check(given.dtype, methods, x_TD)
        if given.tune:
            _tune(methods[1], x_TD, upstream_TD)
        times = interleave({m.name: m.timed(x_TD, upstream_TD) for m in methods}, given.repeats)
        flops = 6 * round(mean_k * shape.tokens) * shape.hidden * shape.width
        for name, passes in times.items():
            seconds = {d: statistics.median(p.of(d) for p in passes) for d in ("forward", "both")}
            both = 3 * flops / seconds["both"]
            faster = statistics.median(
                a.of("both") / b.of("both") for a, b in zip(times["grouped_mm"], passes, strict=True)
            )
            rows.append({
                "tokens": shape.tokens, "hidden": shape.hidden, "width": shape.width, "experts": experts,
                "mean_k": mean_k, "method": name, "forward_tflops": flops / seconds["forward"] / 1e12,
                "both_tflops": both / 1e12, "share_of_peak": both / peak, "over_grouped_mm": faster,
                "peak_tflops": peak / 1e12, "wanted": f"{goal:g} {kind}",
            })  # fmt: skip
    return rows


def _peak(dtype: str, size: int) -> float:
    """FLOP/s of a large product, the median of twenty."""
    a, b = torch.randn(2, size, size, device=DEVICE, dtype=DTYPES[dtype]).unbind()
    times = interleave({"product": lambda: time_passes(lambda: a @ b, lambda _: None)}, 20)["product"]
    return 2 * size**3 / statistics.median(p.forward for p in times)


def _tune(method: Method, x_TD: Tensor, upstream_TD: Tensor) -> None:
    """Tries tiles for one kind of kernel after another, keeps the fastest, and prints them."""
    settings: dict[str, Tiles] = {}
    chosen = kernels.choose_tiles

    def choose(kind: str, num_rows: int, num_experts: int, dtype: torch.dtype, capability: int) -> Tiles:
        return settings.get(kind) or chosen(kind, num_rows, num_experts, dtype, capability)

    kernels.choose_tiles = choose
    for kind in ("up", "gradient", "rows", "weights"):
        best: tuple[float, Tiles | None] = (float("inf"), None)
        for sizes in itertools.product((64, 128), (64, 128, 256), (32, 64), (4, 8), (2, 3, 4)):
            settings[kind] = Tiles(*sizes)
            try:
                seconds = _median(method.timed(x_TD, upstream_TD))
            except Exception as error:  # tiles that exceed the GPU's resources
                print(f"{kind} {settings[kind]}: {type(error).__name__}")
                continue
            best = min(best, (seconds, settings[kind]), key=lambda pair: pair[0])
        if best[1] is not None:
            settings[kind] = best[1]
        print(f"{kind}: {best[1]}, {best[0] * 1e3:.2f} ms", flush=True)


def _median(run: Callable[[], Passes]) -> float:
    return statistics.median(p.of("both") for p in interleave({"": run}, 5)[""])


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    said = []
    for row in (row for row in rows if row["method"] == "triton"):
        where = f"E {row['experts']}, K̄ {row['mean_k']:g}"
        goal, kind = row["wanted"].split()
        value = row["share_of_peak"] if kind == "share" else row["both_tflops"]
        said.append(verdict(f"{where}: {goal} over the {kind} {value:.3f}", float(goal) / value, 1.0))
        said.append(verdict(f"{where}: 1.3 over the gain on grouped_mm", 1.3 / row["over_grouped_mm"], 1.0))
    return said
