"""Our kernels against a loop over experts in fp32: the output and every gradient, at sizes of real layers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.report import verdict
from dynmoe.errors import first_line
from dynmoe.ops import pick_backend, routed_experts
from harness.plans import DEVICE, Shape, spread_plan

_TENSORS = ("y", "x", "gates", "w_up", "w_down")
_SUMS = ("sum of w_up", "sum of w_down")
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


@dataclass(frozen=True)
class Case:
    """``holes``: tokens without experts and experts without tokens: 0 none, 1 some, 2 all."""

    name: str
    shape: Shape
    mean_k: float
    load: float = 1.5
    holes: int = 0


_CASES = [
    Case("fine", Shape(8192, 2048, 1408, 64), 6.0),
    Case("wide", Shape(8192, 1024, 2816, 16), 2.0),
    Case("many", Shape(8192, 2048, 768, 128), 8.0),
    # Each height of a tile of rows has settings of its own.
    Case("64 rows an expert", Shape(2048, 2048, 1408, 64), 2.0),
    Case("32 rows an expert", Shape(1024, 2048, 1408, 64), 2.0),
    Case("16 rows an expert", Shape(512, 2048, 1408, 64), 2.0),
    Case("skewed, with holes", Shape(8192, 1024, 2816, 64), 2.0, 16.0, 1),
    Case("nothing divides", Shape(2001, 392, 264, 5), 2.0, 2.0, 1),
    Case("no routes", Shape(2001, 392, 264, 5), 2.0, 2.0, 2),
]
_SMALL = [
    Case("small, with holes", Shape(17, 24, 24, 3), 1.5, 1.5, 1),
    Case("small, no routes", Shape(9, 24, 24, 2), 1.0, 1.0, 2),
]


def measure() -> Iterator[dict[str, Any]]:
    """Yields the relative error of each tensor, a row for each case and dtype; without a GPU in small."""
    cuda = DEVICE.type == "cuda"
    for dtype in (torch.bfloat16 if cuda else torch.float16, torch.float32):  # the interpreter has no bf16
        for case in _CASES if cuda else _SMALL:
            row = {"case": case.name, "dtype": str(dtype).removeprefix("torch."), "limit": LIMITS[dtype]}
            try:
                yield row | _compare(case, dtype)
            except Exception as error:  # a kernel that does not compile; the others may
                yield row | {"problem": first_line(error)}


def _compare(case: Case, dtype: torch.dtype) -> dict[str, Any]:
    map_TE, gates_TE = _routes(case)
    shape = case.shape
    torch.manual_seed(0)
    sizes = [
        (shape.tokens, shape.hidden), (shape.experts, 2 * shape.width, shape.hidden),
        (shape.experts, shape.hidden, shape.width), (shape.tokens, shape.hidden),
    ]  # fmt: skip
    x, up, down, upstream = (torch.randn(*size, device=DEVICE).to(dtype) for size in sizes)
    leaves = [x, gates_TE, up * shape.hidden**-0.5, down * shape.width**-0.5]
    rows = int(map_TE.sum())
    ours, padded = (_pass("triton", map_TE, leaves, upstream, most) for most in (rows, rows + 700))
    expected = _pass("loop", map_TE, [leaf.float() for leaf in leaves], upstream.float(), None)
    compared = zip(_TENSORS + _SUMS, ours + _sums(map_TE, leaves, upstream), expected + expected[3:], strict=True)
    errors = {name: _error(*pair) for name, *pair in compared}
    return errors | {"spare_rows_equal": all(torch.equal(*pair) for pair in zip(ours, padded, strict=True))}


def _routes(case: Case) -> tuple[Tensor, Tensor]:
    plan = spread_plan(case.shape, case.mean_k, case.load)
    map_TE = plan.routing_map_TE
    if case.holes:
        tokens, experts = map_TE.shape
        map_TE[:, 0 if case.holes == 2 else experts * 3 // 4 :] = False
        map_TE[: tokens // 8] = False
    return map_TE, plan.gates_TE * map_TE


def _pass(name: str, map_TE: Tensor, leaves: list[Tensor], upstream: Tensor, most_rows: int | None) -> list[Tensor]:
    x, gates, up, down = (leaf.detach().clone().requires_grad_() for leaf in leaves)
    backend = pick_backend(name, DEVICE, x.dtype)
    y = routed_experts(x, gates, up, down, backend.permutation(map_TE, most_rows), backend)
    return [y.detach(), *torch.autograd.grad(y, (x, gates, up, down), upstream)]


def _sums(map_TE: Tensor, leaves: list[Tensor], upstream: Tensor) -> list[Tensor]:
    """Gradients of the weights that the kernels add to fp32 sums, as under Megatron-Core."""
    x, gates, up, down = (leaf.detach().clone().requires_grad_() for leaf in leaves)
    for weight in (up, down):
        weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)  # type: ignore[attr-defined]
        weight.adds_to_main_grad = True  # type: ignore[attr-defined]
    backend = pick_backend("triton", DEVICE, x.dtype)
    y = routed_experts(x, gates, up, down, backend.permutation(map_TE), backend)
    y.backward(upstream)
    return [up.main_grad, down.main_grad]  # type: ignore[attr-defined]


def _error(ours: Tensor, expected: Tensor) -> float:
    difference = (ours.float() - expected).norm()
    return (difference / expected.norm() if expected.any() else difference).item()


def failures(rows: list[dict[str, Any]]) -> list[str]:
    """What is wrong, in a phrase for each row that fails."""
    found = []
    for row in rows:
        where = f"kernels, {row['case']}, {row['dtype']}"
        wrong = [name for name in _TENSORS + _SUMS if name in row and not row[name] <= row["limit"]]
        if "problem" in row:
            found.append(f"{where}: {row['problem']}")
        elif wrong:
            found.append(f"{where}: {', '.join(wrong)} off by more than {row['limit']:g}")
        elif not row["spare_rows_equal"]:
            found.append(f"{where}: rows that are not in use change the result")
    return found


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    return [verdict("kernels that differ from a loop, by cases and dtypes", len(failures(rows)), 0)]
