"""All-to-all of rows with uneven splits, differentiable, over any process group (gloo or NCCL)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def exchange_counts(counts_RE: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Tells every rank how many rows it will get.

    Args:
        counts_RE: int64 [R, E_local]; rows that this rank sends to each expert of each of the R ranks.

    Returns:
        int64 [R, E_local]; rows that each rank sends to each expert of this rank.
    """
    received_RE = torch.empty_like(counts_RE)
    dist.all_to_all_single(received_RE, counts_RE.contiguous(), group=group)
    return received_RE


def _exchange(rows: Tensor, send: Sequence[int], receive: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    received = rows.new_empty((sum(receive), *rows.shape[1:]))
    dist.all_to_all_single(received, rows.contiguous(), list(receive), list(send), group=group)
    return received


class _AllToAllRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, send: Sequence[int], receive: Sequence[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        return _exchange(rows, send, receive, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        return _exchange(grad, ctx.receive, ctx.send, ctx.group), None, None, None


def all_to_all_rows(rows: Tensor, send: Sequence[int], receive: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """Sends ``send[r]`` consecutive rows to rank r and returns the ``receive[r]`` rows of each rank r, in rank order.

    The gradient takes the same way back. Every rank of ``group`` must call it, with or without rows.
    """
    return _AllToAllRows.apply(rows, send, receive, group)
