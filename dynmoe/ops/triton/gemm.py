"""Grouped matrix products over rows sorted by expert, with fused gather and activation.

All kernels are persistent: a fixed number of programs processes the tiles of all experts. The number of tiles is
derived on the device from the ends of the experts' rows, so no launch synchronizes with the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl


@dataclass(frozen=True)
class Tiles:
    """Tile sizes (rows, columns, contraction) and launch options."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


@triton.jit
def _plan_tiles(ends_ptr, num_columns, E: tl.constexpr, E_PAD: tl.constexpr, ROWS: tl.constexpr):
    """Returns the end of each expert's rows, the end of its row tiles (both in registers), and the number of tiles."""
    lane = tl.arange(0, E_PAD)
    ends = tl.load(ends_ptr + lane, mask=lane < E, other=0)
    starts = tl.load(ends_ptr + lane - 1, mask=(lane > 0) & (lane < E), other=0)
    tiles = tl.where(lane < E, (ends - starts + ROWS - 1) // ROWS, 0)
    tile_ends = tl.cumsum(tiles, axis=0)
    return ends, tile_ends, tl.max(tile_ends, axis=0) * num_columns


@triton.jit
def _locate(
    tile, num_columns, ends, tile_ends, E: tl.constexpr, E_PAD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Returns a tile's expert, rows and columns, and a mask of the rows that belong to the expert."""
    place = tile // num_columns  # index of the row tile
    lane = tl.arange(0, E_PAD)
    expert = tl.sum(((tile_ends <= place) & (lane < E)).to(tl.int32), axis=0)
    # Both increase with the expert, so the maximum over all earlier experts is the value of the previous one.
    first_tile = tl.max(tl.where(lane < expert, tile_ends, 0), axis=0)
    first_row = tl.max(tl.where(lane < expert, ends, 0), axis=0)
    end = tl.sum(tl.where(lane == expert, ends, 0), axis=0)
    row = first_row + (place - first_tile) * ROWS + tl.arange(0, ROWS)
    column = (tile % num_columns) * COLUMNS + tl.arange(0, COLUMNS)
    return expert, row, column, row < end


@triton.jit
def _product(
    a_ptr, source, inside, b_ptr, column, width, depth, stride_depth, stride_column,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Multiplies rows ``source`` of a [., depth] by a tile of columns of b, in fp32."""
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    k = tl.arange(0, DEPTH)
    a_ptrs = a_ptr + source.to(tl.int64)[:, None] * depth + k[None, :]
    b_ptrs = b_ptr + k[:, None] * stride_depth + column.to(tl.int64)[None, :] * stride_column
    for start in range(0, depth, DEPTH):
        left = depth - start
        a = tl.load(a_ptrs, mask=inside[:, None] & (k[None, :] < left), other=0.0)
        b = tl.load(b_ptrs, mask=(k[:, None] < left) & (column[None, :] < width), other=0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
        a_ptrs += DEPTH
        b_ptrs += DEPTH * stride_depth
    return total


@triton.jit
def _rows_kernel(
    a_ptr, b_ptr, out_ptr, ends_ptr, width, depth, stride_expert, stride_depth, stride_column,
    E: tl.constexpr, E_PAD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out[row] = a[row] @ b[expert of row]."""
    num_columns = tl.cdiv(width, COLUMNS)
    ends, tile_ends, num_tiles = _plan_tiles(ends_ptr, num_columns, E, E_PAD, ROWS)
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        expert, row, column, inside = _locate(tile, num_columns, ends, tile_ends, E, E_PAD, ROWS, COLUMNS)
        total = _product(
            a_ptr, row, inside, b_ptr + expert.to(tl.int64) * stride_expert, column, width, depth, stride_depth,
            stride_column, ROWS, COLUMNS, DEPTH, PRECISION,
        )  # fmt: skip
        mask = inside[:, None] & (column[None, :] < width)
        out_ptrs = out_ptr + row.to(tl.int64)[:, None] * width + column[None, :]
        tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _up_kernel(
    x_ptr, token_ptr, route_ptr, gates_ptr, w_ptr, h_ptr, a_ptr, ends_ptr, width, depth,
    E: tl.constexpr, E_PAD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """h[row] = x[token] @ w[expert], both halves, and a[row] = gate * silu(h1) * h2."""
    dtype = h_ptr.dtype.element_ty
    num_columns = tl.cdiv(width, COLUMNS)
    ends, tile_ends, num_tiles = _plan_tiles(ends_ptr, num_columns, E, E_PAD, ROWS)
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        expert, row, column, inside = _locate(tile, num_columns, ends, tile_ends, E, E_PAD, ROWS, COLUMNS)
        token = tl.load(token_ptr + row, mask=inside, other=0)
        gate = tl.load(gates_ptr + tl.load(route_ptr + row, mask=inside, other=0), mask=inside, other=0.0)
        # One pass over x computes both halves.
        h1 = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        h2 = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        k = tl.arange(0, DEPTH)
        x_ptrs = x_ptr + token.to(tl.int64)[:, None] * depth + k[None, :]
        w_ptrs = w_ptr + (expert.to(tl.int64) * 2 * width + column[None, :]) * depth + k[:, None]
        second = width.to(tl.int64) * depth
        for start in range(0, depth, DEPTH):
            left = depth - start
            x = tl.load(x_ptrs, mask=inside[:, None] & (k[None, :] < left), other=0.0)
            present = (k[:, None] < left) & (column[None, :] < width)
            h1 = tl.dot(x, tl.load(w_ptrs, mask=present, other=0.0), h1, input_precision=PRECISION)
            h2 = tl.dot(x, tl.load(w_ptrs + second, mask=present, other=0.0), h2, input_precision=PRECISION)
            x_ptrs += DEPTH
            w_ptrs += DEPTH
        mask = inside[:, None] & (column[None, :] < width)
        h_ptrs = h_ptr + row.to(tl.int64)[:, None] * (2 * width) + column[None, :]
        tl.store(h_ptrs, h1.to(dtype), mask=mask)
        tl.store(h_ptrs + width, h2.to(dtype), mask=mask)
        # From the rounded values, which the backward pass will read.
        h1 = h1.to(dtype).to(tl.float32)
        h2 = h2.to(dtype).to(tl.float32)
        a = gate[:, None] * h1 * tl.sigmoid(h1) * h2
        tl.store(a_ptr + row.to(tl.int64)[:, None] * width + column[None, :], a.to(dtype), mask=mask)


@triton.jit
def _activation_gradient_kernel(
    grad_ptr, token_ptr, route_ptr, gates_ptr, w_ptr, h_ptr, a_ptr, partial_ptr, ends_ptr, width, depth,
    E: tl.constexpr, E_PAD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Computes the gradient of a[row] without storing it. Overwrites h with its gradient, recomputes the activation,
    and stores this tile's part of the gate's gradient."""
    dtype = h_ptr.dtype.element_ty
    num_columns = tl.cdiv(width, COLUMNS)
    ends, tile_ends, num_tiles = _plan_tiles(ends_ptr, num_columns, E, E_PAD, ROWS)
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        expert, row, column, inside = _locate(tile, num_columns, ends, tile_ends, E, E_PAD, ROWS, COLUMNS)
        token = tl.load(token_ptr + row, mask=inside, other=0)
        gate = tl.load(gates_ptr + tl.load(route_ptr + row, mask=inside, other=0), mask=inside, other=0.0)
        expert_ptr = w_ptr + expert.to(tl.int64) * depth * width
        grad = _product(
            grad_ptr, token, inside, expert_ptr, column, width, depth, width, 1, ROWS, COLUMNS, DEPTH, PRECISION
        )
        mask = inside[:, None] & (column[None, :] < width)
        h_ptrs = h_ptr + row.to(tl.int64)[:, None] * (2 * width) + column[None, :]
        h1 = tl.load(h_ptrs, mask=mask, other=0.0).to(tl.float32)
        h2 = tl.load(h_ptrs + width, mask=mask, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(h1)
        silu = h1 * sigmoid
        a = silu * h2
        tl.store(
            partial_ptr + row.to(tl.int64) * num_columns + tile % num_columns, tl.sum(grad * a, axis=1), mask=inside
        )
        grad *= gate[:, None]
        tl.store(h_ptrs, (grad * h2 * (sigmoid + silu * (1.0 - sigmoid))).to(dtype), mask=mask)
        tl.store(h_ptrs + width, (grad * silu).to(dtype), mask=mask)
        a_ptrs = a_ptr + row.to(tl.int64)[:, None] * width + column[None, :]
        tl.store(a_ptrs, (gate[:, None] * a).to(dtype), mask=mask)


@triton.jit
def _weights_kernel(
    a_ptr, b_ptr, token_ptr, out_ptr, ends_ptr, height, width,
    GATHER_A: tl.constexpr, E: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[expert] = (rows of a)^T @ (rows of b) over the rows of the expert; 0 if it has none. One operand holds tokens
    instead of rows; its rows are gathered."""
    num_rows = tl.cdiv(height, ROWS)
    num_columns = tl.cdiv(width, COLUMNS)
    for tile in range(tl.program_id(0), E * num_rows * num_columns, tl.num_programs(0)):
        expert = tile // (num_rows * num_columns)
        i = (tile // num_columns) % num_rows * ROWS + tl.arange(0, ROWS)
        j = tile % num_columns * COLUMNS + tl.arange(0, COLUMNS)
        first = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
        end = tl.load(ends_ptr + expert)
        total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for start in range(first, end, DEPTH):
            row = start + tl.arange(0, DEPTH)
            inside = row < end
            token = tl.load(token_ptr + row, mask=inside, other=0)
            source_a = (token if GATHER_A else row).to(tl.int64)
            source_b = (row if GATHER_A else token).to(tl.int64)
            a_ptrs = a_ptr + source_a[:, None] * height + i[None, :]
            a = tl.load(a_ptrs, mask=inside[:, None] & (i[None, :] < height), other=0.0)
            b_ptrs = b_ptr + source_b[:, None] * width + j[None, :]
            b = tl.load(b_ptrs, mask=inside[:, None] & (j[None, :] < width), other=0.0)
            total = tl.dot(tl.trans(a), b, total, input_precision=PRECISION)
        out_ptrs = out_ptr + (expert.to(tl.int64) * height + i[:, None]) * width + j[None, :]
        mask = (i[:, None] < height) & (j[None, :] < width)
        tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=mask)
