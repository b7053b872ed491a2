"""Weight gradients: products over the rows of each expert, one operand of which is gathered from tokens.

The kernel is persistent and reads operands as those of ``gemm.py`` do.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dynmoe.ops.triton.gemm import _grouped


@triton.jit
def _contraction_tile(
    x, source, column, inside,
    WIDTH: tl.constexpr, TRANSPOSE: tl.constexpr, COLUMNS: tl.constexpr, WHOLE: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Columns ``column`` to ``column + COLUMNS`` of rows of x [., WIDTH], 0 outside unless WHOLE, arbitrary past the
    width. ``source``: with a descriptor the first row, otherwise every row."""
    if TMA:
        tile = x.load([source, column])
        tile = tile if WHOLE else tl.where(inside[:, None], tile, 0.0)
        tile = tile.T if TRANSPOSE else tile
    else:
        column_ptrs = x + (column + tl.arange(0, COLUMNS)) % WIDTH
        offset = source.to(tl.int64) * WIDTH
        # Transposed in registers, it could not be copied ahead on cards whose products read registers.
        if TRANSPOSE:
            ptrs = column_ptrs[:, None] + offset[None, :]
            mask = inside[None, :]
        else:
            ptrs = column_ptrs[None, :] + offset[:, None]
            mask = inside[:, None]
        tile = tl.load(ptrs) if WHOLE else tl.load(ptrs, mask=mask, other=0.0)
    return tile


@triton.jit
def _weights_step(
    total, a, b, token, start, end, i, j,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, GATHER_A: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Adds the product of DEPTH rows; WHOLE: all of them belong to the expert."""
    row = start + tl.arange(0, DEPTH)
    source = start if TMA else row
    a_source = token if GATHER_A else source
    b_source = source if GATHER_A else token
    a_tile = _contraction_tile(a, a_source, i, row < end, HEIGHT, True, ROWS, WHOLE, TMA and not GATHER_A)
    b_tile = _contraction_tile(b, b_source, j, row < end, WIDTH, False, COLUMNS, WHOLE, TMA and GATHER_A)
    return tl.dot(a_tile, b_tile, total, input_precision=PRECISION)


@triton.jit
def _store(
    total, out_ptr, i, j,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PART: tl.constexpr,
    ADDS: tl.constexpr,
):  # fmt: skip
    """Stores a tile in its matrix, or adds it. PART columns after one another: a second tile does not fit into
    registers."""
    if COLUMNS > PART:
        HALF: tl.constexpr = COLUMNS // 2
        left, right = total.reshape(ROWS, 2, HALF).permute(0, 2, 1).split()
        _store(left, out_ptr, i, j, HEIGHT, WIDTH, ROWS, HALF, PART, ADDS)
        _store(right, out_ptr, i, j + HALF, HEIGHT, WIDTH, ROWS, HALF, PART, ADDS)
    else:
        row = i + tl.arange(0, ROWS)[:, None]
        column = j + tl.arange(0, COLUMNS)[None, :]
        mask = (row < HEIGHT) & (column < WIDTH)
        out_ptrs = out_ptr + (row * WIDTH + column)
        if ADDS:
            total += tl.load(out_ptrs, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_experts"])
def _weights_kernel(
    a, b, token_ptr, out_ptr, ends_ptr, num_experts,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, GATHER_A: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr, PART: tl.constexpr, ADDS: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """out[expert] = (rows of a)^T @ (rows of b) over the rows of the expert, 0 if it has none; ADDS: out[expert] += it.
    One operand holds tokens instead of rows; its rows are gathered."""
    num_rows = tl.cdiv(HEIGHT, ROWS)
    num_columns = tl.cdiv(WIDTH, COLUMNS)
    lane = tl.arange(0, DEPTH)
    for tile in range(tl.program_id(0), num_experts * num_rows * num_columns, tl.num_programs(0)):
        expert = tile // (num_rows * num_columns)
        i, j = _grouped(tile % (num_rows * num_columns), num_rows, num_columns, GROUP)
        i *= ROWS
        j *= COLUMNS
        first = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
        end = tl.load(ends_ptr + expert)
        rest = end - (end - first) % DEPTH
        own_ptr = out_ptr + expert.to(tl.int64) * HEIGHT * WIDTH
        total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        token = tl.load(token_ptr + first + lane, mask=first + lane < end, other=0)
        for start in range(first, rest, DEPTH):
            # The indices of the next rows: when their tokens are to be copied, they are here.
            next_token = tl.load(token_ptr + tl.minimum(start + DEPTH, rest - DEPTH) + lane)
            total = _weights_step(
                total, a, b, token, start, end, i, j, HEIGHT, WIDTH, GATHER_A, ROWS, COLUMNS, DEPTH, PRECISION, TMA,
                True,
            )  # fmt: skip
            token = next_token
        if rest < end:
            token = tl.load(token_ptr + rest + lane, mask=rest + lane < end, other=0)
            total = _weights_step(
                total, a, b, token, rest, end, i, j, HEIGHT, WIDTH, GATHER_A, ROWS, COLUMNS, DEPTH, PRECISION, TMA,
                False,
            )  # fmt: skip
        _store(total, own_ptr, i, j, HEIGHT, WIDTH, ROWS, COLUMNS, PART if ADDS else COLUMNS, ADDS)
