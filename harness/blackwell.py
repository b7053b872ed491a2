"""A stand-in for PyTorch's scaled grouped product, which only data center Blackwell has, on any device.

PyTorch's own function for shapes checks the operands. Scales are read where cuBLAS documents them (1D block scaling
factors layout), one at a time and without the code of ``dynmoe.ops.mxfp8``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

_BLOCK = 32


def _numbers(elements_RK: Tensor, scales: Tensor) -> Tensor:
    """The numbers of a matrix whose scales lie at the beginning of flat ``scales``."""
    rows, columns = elements_RK.shape[0], elements_RK.shape[1] // _BLOCK
    tiles = -(-columns // 4)
    row = torch.arange(rows)[:, None]
    column = torch.arange(columns)
    place = 512 * (row // 128 * tiles + column // 4) + row % 32 * 16 + row % 128 // 32 * 4 + column % 4
    return elements_RK.double() * scales.double()[place].repeat_interleave(_BLOCK, dim=1)


def _padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _rows_product(a_PK: Tensor, b_EKJ: Tensor, scales_a: Tensor, scales_b: Tensor, ends: list[int]) -> Tensor:
    out = torch.full((len(a_PK), b_EKJ.shape[2]), torch.nan, dtype=torch.float64)
    first = 0
    for expert, (start, end) in enumerate(pairwise([0, *ends])):
        rows = _numbers(a_PK[start:end], scales_a.flatten()[first:])
        out[start:end] = rows @ _numbers(b_EKJ[expert].t(), scales_b[expert]).t()
        first += _padded(end - start, 128) * scales_a.shape[1]
    return out


def _contraction_product(a_IP: Tensor, b_PJ: Tensor, scales_a: Tensor, scales_b: Tensor, ends: list[int]) -> Tensor:
    out = []
    first = [0, 0]
    for start, end in pairwise([0, *ends]):
        columns = _padded((end - start) // _BLOCK, 4)
        left = _numbers(a_IP[:, start:end], scales_a.flatten()[first[0] :])
        right = _numbers(b_PJ[start:end].t(), scales_b.flatten()[first[1] :])
        out.append(left @ right.t())
        first = [place + len(scales) * columns for place, scales in zip(first, (scales_a, scales_b), strict=True)]
    return torch.stack(out)


@contextmanager
def anywhere() -> Iterator[list[tuple[int, ...]]]:
    """Replaces the product; yields a list to which it adds the shape of the second operand of each call."""
    calls: list[tuple[int, ...]] = []

    def product(
        a: Tensor, b: Tensor, scale_a: Tensor, recipe_a: Any, scale_b: Tensor, recipe_b: Any, swizzle_a: Any,
        swizzle_b: Any, *, offs: Tensor, output_dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        assert recipe_a == recipe_b == F.ScalingType.BlockWise1x32
        assert swizzle_a == swizzle_b == F.SwizzleType.SWIZZLE_32_4_4
        torch._scaled_grouped_mm(
            a.to("meta"), b.to("meta"), scale_a.to("meta"), scale_b.to("meta"), offs=offs.to("meta"),
            out_dtype=output_dtype,
        )  # fmt: skip
        compute = _rows_product if b.dim() == 3 else _contraction_product
        out = compute(a, b, scale_a, scale_b, offs.tolist())
        calls.append(tuple(b.shape) if b.dim() == 3 else (a.shape[0], b.shape[1]))
        return out.to(output_dtype)

    with patch.object(F, "scaled_grouped_mm", product):
        yield calls
