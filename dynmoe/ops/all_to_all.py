"""All-to-all of rows with uneven splits, differentiable, over any process group (gloo or NCCL)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Wire:
    """The way between the ranks of ``group``.

    Attributes:
        sent_bytes: what left this rank for another while ``counting``, gradients on their way back included.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.counting, self.sent_bytes = group, True, 0
        self.rank, self.num_ranks = dist.get_rank(group), dist.get_world_size(group)

    def exchange_counts(self, counts_RC: Tensor) -> Tensor:
        """Row r goes to rank r; returns what every rank has sent to this one, int64 [R, C]."""
        received_RC = torch.empty_like(counts_RC)
        dist.all_to_all_single(received_RC, counts_RC.contiguous(), group=self.group)
        self._count(counts_RC, [1] * self.num_ranks)
        return received_RC

    def start(self, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> Pending:
        """Begins to send ``send[r]`` consecutive rows to each rank r."""
        received, rows = rows.new_empty((sum(receive), *rows.shape[1:])), rows.contiguous()
        work = dist.all_to_all_single(received, rows, list(receive), list(send), group=self.group, async_op=True)
        self._count(rows, send)
        return Pending(work, rows, received)

    def _count(self, rows: Tensor, send: Sequence[int]) -> None:
        if self.counting:
            self.sent_bytes += (sum(send) - send[self.rank]) * math.prod(rows.shape[1:]) * rows.element_size()


class Pending:
    """An exchange that is under way; it keeps what is sent alive until then."""

    def __init__(self, work: dist.Work, sent: Tensor, received: Tensor) -> None:
        self._work, self._sent, self._received = work, sent, received

    def wait(self) -> Tensor:
        """What was received, in the order of the ranks."""
        self._work.wait()
        return self._received


class Exchange:
    """One all-to-all of rows in two halves, so that other work can lie between them, in both passes.

    Autograd runs nodes in the reverse of the order in which they were made: what lies between ``start`` and ``finish``
    in the forward pass lies between the start and the end of the gradient's way back too.

    Args:
        wire: between the ranks.
        send: rows for each rank.
        receive: rows from each rank.
    """

    def __init__(self, wire: Wire, send: Sequence[int], receive: Sequence[int]) -> None:
        self.wire, self.send, self.receive = wire, send, receive
        self._pending: Pending | None = None

    def start(self, rows: Tensor) -> Tensor:
        """Begins to send; returns a scalar without meaning that :meth:`finish` takes, and nothing else."""
        return _Start.apply(rows, self)

    def finish(self, token: Tensor) -> Tensor:
        """The rows received, in the order of the ranks."""
        return _Finish.apply(token, self)

    def reversed(self) -> Exchange:
        """The way back."""
        return Exchange(self.wire, self.receive, self.send)

    def begin(self, rows: Tensor, *, back: bool) -> None:
        """For the autograd functions: sends rows, or gradients back."""
        sizes = (self.receive, self.send) if back else (self.send, self.receive)
        self._pending = self.wire.start(rows, *sizes)

    def end(self) -> Tensor:
        """For the autograd functions: what came."""
        assert self._pending is not None, "finish() without start()"
        received, self._pending = self._pending.wait(), None
        return received


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        exchange.begin(rows, back=False)
        return rows.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.exchange.end(), None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.end()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        ctx.exchange.begin(grad, back=True)
        return grad.new_zeros(()), None


class _ExchangeRoutes(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, gates_M: Tensor, codes_M: Tensor, wire: Wire, send: Sequence[int], receive: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        ctx.wire, ctx.send, ctx.receive = wire, send, receive
        routes_M2 = torch.stack([gates_M.view(torch.int32), codes_M.to(torch.int32)], dim=1)
        received_M2 = wire.start(routes_M2, send, receive).wait()
        codes_M = received_M2[:, 1].long()
        ctx.mark_non_differentiable(codes_M)
        return received_M2[:, 0].contiguous().view(torch.float32), codes_M

    @staticmethod
    def backward(ctx: Any, grad_M: Tensor, _: None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return ctx.wire.start(grad_M, ctx.receive, ctx.send).wait(), None, None, None, None


def exchange_routes(
    gates_M: Tensor, codes_M: Tensor, wire: Wire, send: Sequence[int], receive: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Sends ``send[r]`` consecutive routes to rank r: an fp32 gate and a number below 2^31 for each, in one exchange.

    Returns:
        the gates, through which gradients go back, and the numbers (int64) that were received, in rank order.
    """
    return _ExchangeRoutes.apply(gates_M, codes_M, wire, send, receive)
