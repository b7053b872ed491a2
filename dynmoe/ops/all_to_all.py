"""Differentiable all-to-all of rows with uneven splits, over any process group (gloo or NCCL)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class AllToAllGroup:
    """All-to-all communication within a process group.

    Attributes:
        sent_bytes: bytes sent to other ranks while ``counting`` is set, gradients included.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.counting = True
        self.sent_bytes = 0
        self.rank = dist.get_rank(group)
        self.num_ranks = dist.get_world_size(group)

    def exchange_counts(self, counts_RC: Tensor) -> Tensor:
        """Sends row r to rank r; returns the rows received from all ranks, int64 [R, C]."""
        received_RC = torch.empty_like(counts_RC)
        dist.all_to_all_single(received_RC, counts_RC.contiguous(), group=self.group)
        self._count(counts_RC, [1] * self.num_ranks)
        return received_RC

    def start(self, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> AllToAllHandle:
        """Starts sending ``send[r]`` consecutive rows to each rank r."""
        received = rows.new_empty((sum(receive), *rows.shape[1:]))
        rows = rows.contiguous()
        work = dist.all_to_all_single(received, rows, list(receive), list(send), group=self.group, async_op=True)
        self._count(rows, send)
        return AllToAllHandle(work, rows, received)

    def _count(self, rows: Tensor, send: Sequence[int]) -> None:
        if self.counting:
            self.sent_bytes += (sum(send) - send[self.rank]) * math.prod(rows.shape[1:]) * rows.element_size()


class AllToAllHandle:
    """An all-to-all in flight; keeps the send buffer alive until it completes."""

    def __init__(self, work: dist.Work, sent: Tensor, received: Tensor) -> None:
        self._work = work
        self._sent = sent
        self._received = received

    def wait(self) -> Tensor:
        """Waits for completion; returns the received rows in rank order."""
        self._work.wait()
        return self._received


class AsyncAllToAll:
    """One all-to-all of rows, split into start and finish so that other work overlaps with it, forward and backward.

    Autograd runs nodes in the reverse of the order in which they were created. Work between ``start`` and ``finish`` in
    the forward pass therefore also runs between the start and the end of the gradient's all-to-all.

    Args:
        group: ranks that take part.
        send: number of rows for each rank.
        receive: number of rows from each rank.
    """

    def __init__(self, group: AllToAllGroup, send: Sequence[int], receive: Sequence[int]) -> None:
        self.group = group
        self.send = send
        self.receive = receive
        self._handle: AllToAllHandle | None = None

    def start(self, rows: Tensor) -> Tensor:
        """Starts sending; returns a dummy scalar for :meth:`finish`, which links the two in the autograd graph."""
        return _Start.apply(rows, self)

    def finish(self, link: Tensor) -> Tensor:
        """Waits; returns the received rows in rank order."""
        return _Finish.apply(link, self)

    def reversed(self) -> AsyncAllToAll:
        """Returns the all-to-all that sends each row back to where it came from."""
        return AsyncAllToAll(self.group, self.receive, self.send)

    def begin(self, rows: Tensor, *, back: bool) -> None:
        """Sends rows, or their gradients ``back``; only for the autograd functions."""
        sizes = (self.receive, self.send) if back else (self.send, self.receive)
        self._handle = self.group.start(rows, *sizes)

    def end(self) -> Tensor:
        """Waits for the received rows; only for the autograd functions."""
        assert self._handle is not None, "finish() without start()"
        received = self._handle.wait()
        self._handle = None
        return received


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, exchange: AsyncAllToAll) -> Tensor:
        ctx.exchange = exchange
        exchange.begin(rows, back=False)
        return rows.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.exchange.end(), None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, link: Tensor, exchange: AsyncAllToAll) -> Tensor:
        ctx.exchange = exchange
        return exchange.end()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        ctx.exchange.begin(grad, back=True)
        return grad.new_zeros(()), None


class _ExchangeRoutes(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, gates_M: Tensor, codes_M: Tensor, group: AllToAllGroup, send: Sequence[int], receive: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        ctx.group = group
        ctx.send = send
        ctx.receive = receive
        routes_M2 = torch.stack([gates_M.view(torch.int32), codes_M.to(torch.int32)], dim=1)
        received_M2 = group.start(routes_M2, send, receive).wait()
        codes_M = received_M2[:, 1].long()
        ctx.mark_non_differentiable(codes_M)
        return received_M2[:, 0].contiguous().view(torch.float32), codes_M

    @staticmethod
    def backward(ctx: Any, grad_M: Tensor, _: None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return ctx.group.start(grad_M, ctx.receive, ctx.send).wait(), None, None, None, None


def exchange_routes(
    gates_M: Tensor, codes_M: Tensor, group: AllToAllGroup, send: Sequence[int], receive: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Sends ``send[r]`` consecutive routes to rank r, each an fp32 gate and a code below 2^31, in one all-to-all.

    Returns:
        the received gates, which are differentiable, and the received codes (int64), in rank order.
    """
    return _ExchangeRoutes.apply(gates_M, codes_M, group, send, receive)
