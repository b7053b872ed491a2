"""Which rank is slow: ranks that wait for each other all take the same time, so work is timed that nobody waits in."""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dynmoe.config.guard import GuardConfig


class SpeedComparison:
    """Compares the ranks in intervals of steps: by the forward passes of modules without collectives, and by loading.

    Args:
        config: interval and limit.
        modules: of this rank; each takes part in every forward pass, with the same shapes on every rank.
        device: that they run on.
    """

    def __init__(self, config: GuardConfig, modules: Sequence[nn.Module], device: torch.device) -> None:
        self._config, self._cuda = config, device.type == "cuda"
        self._host, self._was_slow = socket.gethostname(), set[int]()
        self._marks: list[tuple[Any, Any]] = []
        self._begun: dict[int, Any] = {}
        if config.straggler_interval:
            for module in modules:
                module.register_forward_pre_hook(self._before)
                module.register_forward_hook(self._after)
        self._start_interval()

    def _start_interval(self) -> None:
        self._marks.clear()
        self._loading_s, self._start = 0.0, time.perf_counter()

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _before(self, module: nn.Module, inputs: Any) -> None:
        if module.training:
            self._begun[id(module)] = self._now()

    def _after(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if module.training and id(module) in self._begun:
            self._marks.append((self._begun.pop(id(module)), self._now()))

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Around the time in which a step waits for its data: what is read beside the step before slows nobody."""
        start = time.perf_counter()
        yield
        self._loading_s += time.perf_counter() - start

    def after_step(self, step: int) -> list[str]:
        """Sentences on ranks that are slow in the second interval in a row, on every rank alike.

        Collective where an interval ends with optimizer step ``step``.
        """
        if not self._config.straggler_interval or step % self._config.straggler_interval:
            return []
        own = (self._host, self._seconds_per_call(), self._loading_s, time.perf_counter() - self._start)
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, own)
        self._start_interval()
        slow = self._slow(ranks)
        told = [text for rank, text in slow.items() if rank in self._was_slow]
        self._was_slow = set(slow)
        return told

    def _seconds_per_call(self) -> float:
        if not self._marks:
            return 0.0
        if self._cuda:
            torch.cuda.synchronize()
            total = sum(start.elapsed_time(end) for start, end in self._marks) / 1e3
        else:
            total = sum(end - start for start, end in self._marks)
        return total / len(self._marks)

    def _slow(self, ranks: Sequence[tuple[str, float, float, float]]) -> dict[int, str]:
        """What is slow about each slow rank, given host, seconds per call, loading and whole interval of all."""
        _, computing, loading, whole = zip(*ranks, strict=True)
        usual_computing, usual_loading = statistics.median_low(computing), statistics.median_low(loading)
        limit, found = self._config.straggler_ratio, {}
        for rank, (host, own, own_loading, _) in enumerate(ranks):
            if usual_computing > 0 and own > limit * usual_computing:
                ratio = own / usual_computing
                found[rank] = f"rank {rank} on {host} is slow: {ratio:.1f} x the usual time for the same computation"
            elif own_loading - usual_loading > (1 - 1 / limit) * statistics.median_low(whole):
                share = own_loading / statistics.median_low(whole)
                found[rank] = f"rank {rank} on {host} is slow: loading data takes {share:.0%} of its time"
        return found
