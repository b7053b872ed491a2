"""Counts that are added up over ranks beside the computation, those of all layers of a pass in one all-reduce."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dynmoe.routing import LateCounts
from dynmoe.routing.plan import Weights


class CountsOverRanks:
    """Adds tensors up over the ranks of ``group``, all of which give the same ones in the same order.

    Those that were given since the last :meth:`start` share an all-reduce. Whoever needs a sum earlier starts it.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group, self._waiting = group, list[CountsUnderWay]()

    def add(self, own: Tensor, read: Callable[[Tensor], Any]) -> CountsUnderWay:
        """The sum of ``own`` (fp32) over all ranks; ``read`` makes of it what :meth:`CountsUnderWay.get` returns."""
        under_way = CountsUnderWay(self, own, read)
        self._waiting.append(under_way)
        return under_way

    def start(self) -> None:
        """Sends off what was given; nothing waits for it here."""
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        packed = torch.cat([counts.tensor.flatten() for counts in waiting])
        work = dist.all_reduce(packed, group=self._group, async_op=True)
        for counts, part in zip(waiting, packed.split([counts.tensor.numel() for counts in waiting]), strict=True):
            counts.tensor, counts.work = part.view(counts.shape), work


class CountsUnderWay(LateCounts):
    """One of the tensors of :class:`CountsOverRanks`, and the losses that were made of it before its sum was there.

    Attributes:
        tensor: this rank's; from the end of ``work`` on the sum.
        work: the all-reduce that it is part of; None before that starts.
    """

    def __init__(self, counts: CountsOverRanks, tensor: Tensor, read: Callable[[Tensor], Any]) -> None:
        self.tensor, self.shape = tensor, tensor.shape
        self.work: Any = None
        self._of, self._read, self._sum = counts, read, None
        self._unvalued: list[tuple[Tensor, Tensor, Weights]] = []

    @torch.no_grad()
    def get(self) -> Any:
        """The counts of all ranks. The host waits for them on a CPU, the current stream on a GPU."""
        if self._sum is None:
            if self.work is None:
                self._of.start()
            self.work.wait()
            self._sum = self._read(self.tensor)
            for value, sums, weights in self._unvalued:
                value.copy_((weights(self._sum) * sums).sum())
            self._unvalued.clear()
        return self._sum

    def weigh(self, sums: Tensor, weights: Weights) -> Tensor:
        return _Weigh.apply(sums, self, weights)

    def value(self, sums: Tensor, weights: Weights) -> Tensor:
        """The weighted sum, without gradient."""
        if self._sum is not None:
            return (weights(self._sum) * sums).sum()
        value = sums.new_full((), torch.nan)
        self._unvalued.append((value.detach(), sums.detach(), weights))
        return value


class _Weigh(torch.autograd.Function):
    """Saves nothing, whether the counts are there or not: a repeated pass must save what the first one did."""

    @staticmethod
    def forward(ctx: Any, sums: Tensor, counts: CountsUnderWay, weights: Weights) -> Tensor:
        ctx.counts, ctx.weights = counts, weights
        return counts.value(sums, weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return grad * ctx.weights(ctx.counts.get()), None, None
