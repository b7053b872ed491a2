"""Grouped matrix products over rows sorted by expert, with fused gather and activation.

All kernels but one are persistent: a fixed number of programs processes the tiles of all experts. The number of tiles
is derived on the device from the ends of the experts' rows, so no launch synchronizes with the device.

An operand is either a tensor or, on cards that copy whole tiles (TMA), a descriptor of one. Loops need no masks where
tiles divide the contraction (EVEN): products of what lies outside a matrix are not stored.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl


@dataclass(frozen=True)
class Tiles:
    """Tile sizes (rows, columns, contraction), launch options (``registers``: most of a thread), and tiles of rows that
    are processed together."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    registers: int | None = None
    group: int = 16


@triton.jit
def _grouped(tile, num_rows, num_columns, GROUP: tl.constexpr):
    """Row and column of a tile of a matrix of tiles: GROUP rows of tiles at a time, one column after another.

    Programs that run at the same time process neighbouring tiles. What these share then fits into the cache, even if
    the matrix of an expert does not.
    """
    first = tile // (GROUP * num_columns) * GROUP
    place = tile - first * num_columns
    rows = tl.minimum(num_rows - first, GROUP)
    return first + place % rows, place // rows


@triton.jit
def _plan_tiles(ends_ptr, num_experts, num_columns, E_PAD: tl.constexpr, ROWS: tl.constexpr):
    """Returns the end of each expert's rows, the end of its row tiles (both in registers), and the number of tiles."""
    lane = tl.arange(0, E_PAD)
    ends = tl.load(ends_ptr + lane, mask=lane < num_experts, other=0)
    starts = tl.load(ends_ptr + lane - 1, mask=(lane > 0) & (lane < num_experts), other=0)
    tiles = (ends - starts + ROWS - 1) // ROWS
    tile_ends = tl.cumsum(tiles, axis=0)
    return ends, tile_ends, tl.max(tile_ends, axis=0) * num_columns


@triton.jit
def _locate(
    tile, num_columns, ends, tile_ends, num_experts,
    E_PAD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Returns a tile's expert, its first row and column, and the end of the expert's rows."""
    lane = tl.arange(0, E_PAD)
    expert = tl.sum(((tile_ends <= tile // num_columns) & (lane < num_experts)).to(tl.int32), axis=0)
    # Both increase with the expert, so the maximum over all earlier experts is the value of the previous one.
    first_tile = tl.max(tl.where(lane < expert, tile_ends, 0), axis=0)
    first_row = tl.max(tl.where(lane < expert, ends, 0), axis=0)
    end_tile = tl.max(tl.where(lane <= expert, tile_ends, 0), axis=0)
    end = tl.max(tl.where(lane <= expert, ends, 0), axis=0)
    i, j = _grouped(tile - first_tile * num_columns, end_tile - first_tile, num_columns, GROUP)
    return expert, first_row + i * ROWS, j * COLUMNS, end


@triton.jit
def _rows_tile(a, row, start, depth, DEPTH: tl.constexpr, EVEN: tl.constexpr, TMA: tl.constexpr):
    """Columns ``start`` to ``start + DEPTH`` of rows of a [., depth], 0 past the depth. ``row``: with a descriptor the
    first row, otherwise every row."""
    if TMA:
        tile = a.load([row, start])
    else:
        k = start + tl.arange(0, DEPTH)
        a_ptrs = (a + row.to(tl.int64) * depth)[:, None] + k[None, :]
        tile = tl.load(a_ptrs) if EVEN else tl.load(a_ptrs, mask=k[None, :] < depth, other=0.0)
    return tile


@triton.jit
def _weights_tile(
    w, expert, start, column, depth, width,
    LINEAR: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, EVEN: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Tile [DEPTH, COLUMNS] of the matrix of an expert; 0 past the depth, arbitrary past the width.

    LINEAR: in memory it is [width, depth], as in ``nn.Linear``, otherwise [depth, width].
    """
    if TMA and LINEAR:
        tile = w.load([expert, column, start]).reshape(COLUMNS, DEPTH).T
    elif TMA:
        tile = w.load([expert, start, column]).reshape(DEPTH, COLUMNS)
    else:
        k = tl.arange(0, DEPTH)
        i = (column + tl.arange(0, COLUMNS)) % width
        matrix_ptr = w + expert.to(tl.int64) * depth * width
        if LINEAR:
            w_ptrs = matrix_ptr + start + (i[None, :] * depth + k[:, None])
        else:
            w_ptrs = matrix_ptr + tl.cast(start, tl.int64) * width + (k[:, None] * width + i[None, :])
        tile = tl.load(w_ptrs) if EVEN else tl.load(w_ptrs, mask=(start + k)[:, None] < depth, other=0.0)
    return tile


@triton.jit
def _product(
    a, row, w, expert, column, depth, width,
    LINEAR: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr, TMA_ROWS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Multiplies rows of a [., depth] by columns of an expert's matrix [depth, width], in fp32."""
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, depth, DEPTH):
        a_tile = _rows_tile(a, row, start, depth, DEPTH, EVEN, TMA_ROWS)
        w_tile = _weights_tile(w, expert, start, column, depth, width, LINEAR, COLUMNS, DEPTH, EVEN, TMA)
        total = tl.dot(a_tile, w_tile, total, input_precision=PRECISION)
    return total


@triton.jit(do_not_specialize=["num_experts"])
def _rows_kernel(
    a, w, out_ptr, ends_ptr, num_experts, depth, width,
    LINEAR: tl.constexpr, E_PAD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    GROUP: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """out[row] = a[row] @ w[expert of row]."""
    num_columns = tl.cdiv(width, COLUMNS)
    ends, tile_ends, num_tiles = _plan_tiles(ends_ptr, num_experts, num_columns, E_PAD, ROWS)
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        expert, first, column, end = _locate(
            tile, num_columns, ends, tile_ends, num_experts, E_PAD, ROWS, COLUMNS, GROUP
        )
        row = first + tl.arange(0, ROWS)
        source = first if TMA else tl.minimum(row, end - 1)
        total = _product(
            a, source, w, expert, column, depth, width, LINEAR, ROWS, COLUMNS, DEPTH, EVEN, PRECISION, TMA, TMA
        )
        i = column + tl.arange(0, COLUMNS)
        out_ptrs = (out_ptr + row.to(tl.int64) * width)[:, None] + i[None, :]
        mask = (row < end)[:, None] & (i < width)[None, :]
        tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_experts"])
def _up_kernel(
    x_ptr, token_ptr, route_ptr, gates_ptr, w, h_ptr, a_ptr, ends_ptr, num_experts, depth, width,
    E_PAD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """h[row] = x[token] @ w[expert], both halves, and a[row] = gate * silu(h1) * h2.

    ``w`` has two matrices [width, depth] for each expert.
    """
    dtype = h_ptr.dtype.element_ty
    num_columns = tl.cdiv(width, COLUMNS)
    ends, tile_ends, num_tiles = _plan_tiles(ends_ptr, num_experts, num_columns, E_PAD, ROWS)
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        expert, first, column, end = _locate(
            tile, num_columns, ends, tile_ends, num_experts, E_PAD, ROWS, COLUMNS, GROUP
        )
        row = first + tl.arange(0, ROWS)
        inside = row < end
        token = tl.load(token_ptr + row, mask=inside, other=0)
        # One pass over x computes both halves.
        h1 = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        h2 = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for start in range(0, depth, DEPTH):
            x = _rows_tile(x_ptr, token, start, depth, DEPTH, EVEN, False)
            w1 = _weights_tile(w, 2 * expert, start, column, depth, width, True, COLUMNS, DEPTH, EVEN, TMA)
            w2 = _weights_tile(w, 2 * expert + 1, start, column, depth, width, True, COLUMNS, DEPTH, EVEN, TMA)
            h1 = tl.dot(x, w1, h1, input_precision=PRECISION)
            h2 = tl.dot(x, w2, h2, input_precision=PRECISION)
        gate = tl.load(gates_ptr + tl.load(route_ptr + row, mask=inside, other=0), mask=inside, other=0.0)
        i = column + tl.arange(0, COLUMNS)
        mask = inside[:, None] & (i < width)[None, :]
        h_ptrs = (h_ptr + row.to(tl.int64) * (2 * width))[:, None] + i[None, :]
        h1 = h1.to(dtype)
        h2 = h2.to(dtype)
        tl.store(h_ptrs, h1, mask=mask)
        tl.store(h_ptrs + width, h2, mask=mask)
        # From the rounded values, which the backward pass will read.
        h1 = h1.to(tl.float32)
        a = gate[:, None] * h1 * tl.sigmoid(h1) * h2.to(tl.float32)
        tl.store((a_ptr + row.to(tl.int64) * width)[:, None] + i[None, :], a.to(dtype), mask=mask)


@triton.jit
def _activation_gradient(
    grad, of_gate, gate, first, end, column, h_ptr, a_ptr, width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Stores the gradient of h and the activation, and adds to the gate's gradient [ROWS].

    PART columns after one another: h, the activation and their gradients for all columns do not fit into registers.
    """
    if COLUMNS > PART:
        HALF: tl.constexpr = COLUMNS // 2
        left, right = grad.reshape(ROWS, 2, HALF).permute(0, 2, 1).split()
        of_gate = _activation_gradient(left, of_gate, gate, first, end, column, h_ptr, a_ptr, width, ROWS, HALF, PART)
        of_gate = _activation_gradient(
            right, of_gate, gate, first, end, column + HALF, h_ptr, a_ptr, width, ROWS, HALF, PART
        )
    else:
        row = tl.arange(0, ROWS)
        i = column + tl.arange(0, COLUMNS)
        mask = (row < end - first)[:, None] & (i < width)[None, :]
        h_ptrs = h_ptr + first.to(tl.int64) * (2 * width) + (row[:, None] * (2 * width) + i[None, :])
        a_ptrs = a_ptr + first.to(tl.int64) * width + (row[:, None] * width + i[None, :])
        h1 = tl.load(h_ptrs, mask=mask, other=0.0).to(tl.float32)
        h2 = tl.load(h_ptrs + width, mask=mask, other=0.0).to(tl.float32)
        grad = grad.to(tl.float32)
        sigmoid = tl.sigmoid(h1)
        silu = h1 * sigmoid
        a = silu * h2
        of_gate += tl.sum(grad * a, axis=1)
        grad *= gate[:, None]
        dtype = h_ptr.dtype.element_ty
        tl.store(h_ptrs, (grad * h2 * (sigmoid + silu * (1.0 - sigmoid))).to(dtype), mask=mask)
        tl.store(h_ptrs + width, (grad * silu).to(dtype), mask=mask)
        tl.store(a_ptrs, (gate[:, None] * a).to(dtype), mask=mask)
    return of_gate


@triton.jit(do_not_specialize=["num_experts"])
def _activation_gradient_kernel(
    grad_ptr, token_ptr, route_ptr, gates_ptr, w, h_ptr, a_ptr, partial_ptr, ends_ptr, num_experts, depth, width,
    E_PAD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Computes the gradient of a[row] without storing it. Overwrites h with its gradient, recomputes the activation,
    and stores this tile's part of the gate's gradient.

    Not persistent: it moves more numbers than any other, so two programs share a multiprocessor, and one multiplies
    while the other moves. That takes all registers, and there are none for what a loop over tiles keeps.
    """
    num_columns = tl.cdiv(width, COLUMNS)
    ends, tile_ends, num_tiles = _plan_tiles(ends_ptr, num_experts, num_columns, E_PAD, ROWS)
    tile = tl.program_id(0)
    if tile < num_tiles:
        expert, first, column, end = _locate(
            tile, num_columns, ends, tile_ends, num_experts, E_PAD, ROWS, COLUMNS, GROUP
        )
        row = first + tl.arange(0, ROWS)
        inside = row < end
        token = tl.load(token_ptr + row, mask=inside, other=0)
        grad = _product(
            grad_ptr, token, w, expert, column, depth, width, False, ROWS, COLUMNS, DEPTH, EVEN, PRECISION, False, TMA
        )
        gate = tl.load(gates_ptr + tl.load(route_ptr + row, mask=inside, other=0), mask=inside, other=0.0)
        of_gate = tl.zeros((ROWS,), dtype=tl.float32)
        of_gate = _activation_gradient(
            grad, of_gate, gate, first, end, column, h_ptr, a_ptr, width, ROWS, COLUMNS, PART
        )
        partial_ptrs = partial_ptr + row.to(tl.int64) * num_columns + column // COLUMNS
        tl.store(partial_ptrs, of_gate, mask=inside)
