"""HybridEP's two device calls on gloo, to test the code around them.

They do what ``HybridEPBuffer`` (DeepEP, branch hybrid-ep) does for Megatron-Core: dispatch at most
``num_permuted_tokens`` rows of all ranks, ordered by expert, to this rank; and sum the rows of each token again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor


def _dispatch(
    x: Tensor, routing_map: Tensor, probs: Tensor, group: dist.ProcessGroup, num_local_experts: int,
    num_permuted_tokens: int | None = None, **of_the_device: Any,
) -> tuple[Tensor, Tensor, None, Tensor, tuple[Any, ...]]:  # fmt: skip
    x_all, probs_all = (gather_from_sequence_parallel_region(own, group=group) for own in (x, probs))
    maps = [torch.empty_like(routing_map) for _ in range(dist.get_world_size(group))]
    dist.all_gather(maps, routing_map, group=group)
    first = dist.get_rank(group) * num_local_experts
    held = slice(first, first + num_local_experts)
    expert, token = torch.cat(maps)[:, held].T.nonzero(as_tuple=True)
    room = len(token) if num_permuted_tokens is None else int(num_permuted_tokens)
    overflow = torch.tensor(len(token) > room)
    expert = expert[:room]
    token = token[:room]
    rows = x_all[token]
    row_probs = probs_all[:, held][token, expert]
    if room > len(token):
        rows = torch.cat([rows, rows.new_zeros(room - len(token), rows.shape[1])])
        row_probs = torch.cat([row_probs, row_probs.new_zeros(room - len(token))])
    counts = torch.bincount(expert, minlength=num_local_experts)
    return rows, row_probs, None, counts, (token, len(x_all), group, overflow)


def _combine(x: Tensor, handle: tuple[Any, ...], num_permuted_tokens: Any, **of_the_device: Any) -> Tensor:
    token, count, group, _ = handle
    sums = x.new_zeros(count, x.shape[1]).index_add(0, token, x[: len(token)])
    return reduce_scatter_to_sequence_parallel_region(sums, group=group)


@contextlib.contextmanager
def on_the_cpu() -> Iterator[None]:
    """Runs Megatron's dispatcher without a GPU and without compilation."""
    from megatron.core.transformer.moe import token_dispatcher

    with (
        mock.patch.object(token_dispatcher, "hybrid_ep_dispatch", _dispatch),
        mock.patch.object(token_dispatcher, "hybrid_ep_combine", _combine),
        torch.compiler.set_stance("force_eager"),
    ):
        yield
