"""Attention over parts of sequences, with a share of the heads on each rank, against attention in one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from dynmoe.model.attention import causal_attention
from dynmoe.ops.sequence_exchange import heads_to_positions, positions_to_heads

LENGTH = 12


def attend(heads: int, kv_heads: int, of_rank: bool) -> list[torch.Tensor]:
    """Output [S, B, H, d] of attention and the gradients of queries, keys and values, at the positions of this rank."""
    generator = torch.Generator().manual_seed(0)
    count = dist.get_world_size()
    own = slice(None)
    if of_rank:
        own = slice(LENGTH // count * dist.get_rank(), LENGTH // count * (dist.get_rank() + 1))
    inputs = [
        torch.randn(LENGTH, 2, n, 8, generator=generator)[own].requires_grad_() for n in (heads, kv_heads, kv_heads)
    ]
    upstream = torch.randn(LENGTH, 2, heads, 8, generator=generator)[own]
    parts = [positions_to_heads(x, dist.group.WORLD) for x in inputs] if of_rank else inputs
    out = causal_attention(*(x.permute(1, 2, 0, 3) for x in parts)).permute(2, 0, 1, 3)
    if of_rank:
        assert parts[0].shape == (LENGTH, 2, heads // count, 8)
        out = heads_to_positions(out, dist.group.WORLD)
    return [out.detach(), *torch.autograd.grad(out, inputs, upstream)]


@pytest.mark.parametrize(
    ("ranks", "heads", "kv_heads"), [(2, 4, 4), (2, 4, 2), (2, 6, 1), (4, 8, 2), (4, 4, 4), (4, 12, 6)]
)
def test_attention_by_heads_equals_attention_in_one_process(two_ranks, four_ranks, ranks, heads, kv_heads):
    pool = {2: two_ranks, 4: four_ranks}[ranks]
    whole = pool.run(attend, heads, kv_heads, False)[0]
    parts = zip(*pool.run(attend, heads, kv_heads, True), strict=True)
    for part, expected in zip(parts, whole, strict=True):
        torch.testing.assert_close(torch.cat(list(part)), expected)
