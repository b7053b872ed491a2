"""Asynchronous sums of counts over ranks: one all-reduce for all layers of a forward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dynmoe.routing import AsyncCounts
from dynmoe.routing.plan import Weights


class CountsOverRanks:
    """Sums tensors over the ranks of ``group``, which must all add them in the same order.

    Tensors that were added since the last :meth:`start` share an all-reduce. Reading a sum starts it if necessary.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._pending: list[PendingCounts] = []

    def add(self, local: Tensor, read: Callable[[Tensor], Any]) -> PendingCounts:
        """The sum of ``local`` (fp32) over all ranks; :meth:`PendingCounts.get` returns ``read`` of it."""
        counts = PendingCounts(self, local, read)
        self._pending.append(counts)
        return counts

    def start(self) -> None:
        """Starts the all-reduce of the added tensors without waiting for it."""
        pending = self._pending
        self._pending = []
        if not pending:
            return
        packed = torch.cat([counts.tensor.flatten() for counts in pending])
        work = dist.all_reduce(packed, group=self._group, async_op=True)
        for counts, part in zip(pending, packed.split([counts.tensor.numel() for counts in pending]), strict=True):
            counts.tensor = part.view(counts.shape)
            counts.work = work


class PendingCounts(AsyncCounts):
    """One tensor of :class:`CountsOverRanks`, and the losses that use it before its sum is known.

    Attributes:
        tensor: the local counts; the sum once ``work`` is complete.
        work: the all-reduce of the tensor; None before it starts.
    """

    def __init__(self, owner: CountsOverRanks, tensor: Tensor, read: Callable[[Tensor], Any]) -> None:
        self.tensor = tensor
        self.shape = tensor.shape
        self.work: Any = None
        self._owner = owner
        self._read = read
        self._sum: Any = None
        self._losses: list[tuple[Tensor, Tensor, Weights]] = []

    @torch.no_grad()
    def get(self) -> Any:
        """The counts of all ranks. On a CPU the host waits for them, on a GPU the current stream."""
        if self._sum is None:
            if self.work is None:
                self._owner.start()
            self.work.wait()
            self._sum = self._read(self.tensor)
            for value, sums, weights in self._losses:
                value.copy_((weights(self._sum) * sums).sum())
            self._losses.clear()
        return self._sum

    def weigh(self, sums: Tensor, weights: Weights) -> Tensor:
        return _Weigh.apply(sums, self, weights)

    def value(self, sums: Tensor, weights: Weights) -> Tensor:
        """The weighted sum, without gradient; NaN until :meth:`get` fills it in."""
        if self._sum is not None:
            return (weights(self._sum) * sums).sum()
        value = sums.new_full((), torch.nan)
        self._losses.append((value.detach(), sums.detach(), weights))
        return value


class _Weigh(torch.autograd.Function):
    """Saves no tensors: a recomputed forward pass, which may find the sum known, must save the same as the first."""

    @staticmethod
    def forward(ctx: Any, sums: Tensor, counts: PendingCounts, weights: Weights) -> Tensor:
        ctx.counts = counts
        ctx.weights = weights
        return counts.value(sums, weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return grad * ctx.weights(ctx.counts.get()), None, None
