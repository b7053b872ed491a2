"""Sums over the rows of each token, and the gradient of the gates in the layout of the routing map."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _sum_rows_kernel(rows_ptr, row_ptr, offsets_ptr, out_ptr, width, WIDTH: tl.constexpr):
    """Sums one slice of the columns of one token: adds its rows in fp32, in the order of the experts."""
    token = tl.program_id(0)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = column < width
    total = tl.zeros((WIDTH,), dtype=tl.float32)
    for place in range(tl.load(offsets_ptr + token), tl.load(offsets_ptr + token + 1)):
        row = tl.load(row_ptr + place).to(tl.int64)
        total += tl.load(rows_ptr + row * width + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + token.to(tl.int64) * width + column, total.to(out_ptr.dtype.element_ty), mask=inside)


def sum_rows(rows_ND: Tensor, row_N: Tensor, token_offsets: Tensor) -> Tensor:
    """Sums the rows of each token, [T, D]; 0 for a token without rows. Deterministic."""
    num_tokens = token_offsets.shape[0] - 1
    width = rows_ND.shape[1]
    out_TD = rows_ND.new_empty(num_tokens, width)
    if num_tokens:
        part = min(triton.next_power_of_2(width), 1024)
        _sum_rows_kernel[(num_tokens, triton.cdiv(width, part))](
            rows_ND, row_N, token_offsets, out_TD, width, WIDTH=part
        )
    return out_TD


@triton.jit
def _gate_gradient_kernel(
    partial_ptr, route_ptr, ends_ptr, out_ptr, num_parts, E: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr
):
    """Adds up the parts of a block of rows and stores each at its route."""
    num_rows = tl.load(ends_ptr + E - 1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part = tl.arange(0, PARTS)
    inside = row < num_rows
    mask = inside[:, None] & (part[None, :] < num_parts)
    parts = tl.load(partial_ptr + row[:, None].to(tl.int64) * num_parts + part[None, :], mask=mask, other=0.0)
    route = tl.load(route_ptr + row, mask=inside, other=0)
    tl.store(out_ptr + route, tl.sum(parts, axis=1), mask=inside)


def gate_gradient(partial_NP: Tensor, route_N: Tensor, ends_E: Tensor, like_TE: Tensor) -> Tensor:
    """Sums over P and scatters the sums of the rows in use to their routes, [T, E]; 0 elsewhere."""
    out_TE = torch.zeros_like(like_TE, memory_format=torch.contiguous_format)
    num_rows, num_parts = partial_NP.shape
    if num_rows and num_parts:
        _gate_gradient_kernel[(triton.cdiv(num_rows, 64),)](
            partial_NP, route_N, ends_E, out_TE, num_parts,
            E=ends_E.shape[0], PARTS=triton.next_power_of_2(num_parts), ROWS=64,
        )  # fmt: skip
    return out_TE
