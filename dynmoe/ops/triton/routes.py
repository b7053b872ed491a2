"""Builds a routing map's CSR form by expert and by token, without device synchronization. B: blocks of tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

# Entries of the map in one tile: enough to occupy a warp group, few enough to stay in registers.
_TILE_ENTRIES = 2048


# Arguments that change every step. Specializing on divisibility by 16 would recompile kernels during training.
_CHANGING = ("num_tokens", "num_rows")


@triton.jit(do_not_specialize=_CHANGING[:1])
def _count_kernel(map_ptr, counts_ptr, num_tokens, E: tl.constexpr, E_PAD: tl.constexpr, TOKENS: tl.constexpr):
    """Counts the routes of each expert among the tokens of one tile."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    expert = tl.arange(0, E_PAD)
    inside = (token[:, None] < num_tokens) & (expert[None, :] < E)
    routed = tl.load(map_ptr + token[:, None].to(tl.int64) * E + expert[None, :], mask=inside, other=0).to(tl.int32)
    tl.store(counts_ptr + tl.program_id(0) * E + expert, tl.sum(routed, axis=0), mask=expert < E)


@triton.jit(do_not_specialize=_CHANGING)
def _fill_kernel(
    map_ptr, start_ptr, token_offsets_ptr, token_ptr, route_ptr, row_ptr, num_tokens, num_rows,
    E: tl.constexpr, E_PAD: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Writes the routes of one tile, given each expert's first row in it."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    expert = tl.arange(0, E_PAD)
    inside = (token[:, None] < num_tokens) & (expert[None, :] < E)
    routed = tl.load(map_ptr + token[:, None].to(tl.int64) * E + expert[None, :], mask=inside, other=0).to(tl.int32)
    start = tl.load(start_ptr + tl.program_id(0) * E + expert, mask=expert < E, other=0)
    offset = tl.load(token_offsets_ptr + token, mask=token < num_tokens, other=0)
    row = start[None, :] + tl.cumsum(routed, axis=0) - 1  # sorted by expert, then by token
    place = offset[:, None] + tl.cumsum(routed, axis=1) - 1  # sorted by token, then by expert
    write = inside & (routed > 0) & (row < num_rows) & (place < num_rows)
    tl.store(token_ptr + row, tl.broadcast_to(token[:, None], (TOKENS, E_PAD)), mask=write)
    tl.store(route_ptr + row, token[:, None] * E + expert[None, :], mask=write)
    tl.store(row_ptr + place, row, mask=write)


def build_routes(routing_map_TE: Tensor, num_rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Builds the fields of ``Permutation`` in order, int32, with buffers for ``num_rows`` rows.

    Entries past the last route stay unwritten. The caller must ensure that there are at most ``num_rows`` routes:
    others would be lost.
    """
    num_tokens, num_experts = routing_map_TE.shape
    device = routing_map_TE.device
    padded = triton.next_power_of_2(num_experts)
    tokens = max(1, _TILE_ENTRIES // padded)
    num_tiles = triton.cdiv(num_tokens, tokens)
    sizes = {"E": num_experts, "E_PAD": padded, "TOKENS": tokens}
    counts_BE = torch.empty(num_tiles, num_experts, dtype=torch.int32, device=device)
    # One allocation each: kernels are specialized on alignment, which must not depend on the number of rows.
    token_N, route_N, row_N = (torch.empty(num_rows, dtype=torch.int32, device=device) for _ in range(3))
    map_TE = routing_map_TE.contiguous().view(torch.uint8)
    if num_tiles:
        _count_kernel[(num_tiles,)](map_TE, counts_BE, num_tokens, **sizes)
    ends_E = counts_BE.sum(dim=0).cumsum(0)
    totals_BE = counts_BE.cumsum(0)
    start_BE = (totals_BE - counts_BE + F.pad(ends_E, (1, 0))[:-1]).to(torch.int32)
    token_offsets = F.pad(routing_map_TE.sum(dim=1).cumsum(0), (1, 0)).to(torch.int32)
    if num_tiles:
        _fill_kernel[(num_tiles,)](
            map_TE,
            start_BE,
            token_offsets,
            token_N,
            route_N,
            row_N,
            num_tokens,
            num_rows,
            **sizes,
            num_warps=8,
        )
    return token_N, route_N, row_N, token_offsets, ends_E.to(torch.int32)
