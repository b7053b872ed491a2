"""Detection of slow ranks. Since ranks wait for each other in collectives, only work without collectives is timed."""

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
    """Compares the ranks at regular steps by the forward passes of modules without collectives, and by data loading.

    Args:
        config: interval and limit.
        modules: modules of this rank that run in every forward pass, with the same shapes on every rank.
        device: device of the modules.
    """

    def __init__(self, config: GuardConfig, modules: Sequence[nn.Module], device: torch.device) -> None:
        self._config = config
        self._cuda = device.type == "cuda"
        self._host = socket.gethostname()
        self._was_slow: set[int] = set()
        self._marks: list[tuple[Any, Any]] = []
        self._begun: dict[int, Any] = {}
        if config.straggler_interval:
            for module in modules:
                module.register_forward_pre_hook(self._before)
                module.register_forward_hook(self._after)
        self._start_interval()

    def _start_interval(self) -> None:
        self._marks.clear()
        self._loading_s = 0.0
        self._start = time.perf_counter()

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
        """Measures the time in which a step waits for its data, without prefetching during the previous step."""
        start = time.perf_counter()
        yield
        self._loading_s += time.perf_counter() - start

    def after_step(self, step: int) -> list[str]:
        """Descriptions of the ranks that are slow in two consecutive intervals, the same on every rank.

        Collective if an interval ends with optimizer step ``step``.
        """
        if not self._config.straggler_interval or step % self._config.straggler_interval:
            return []
        own = (self._host, self._seconds_per_call(), self._loading_s, time.perf_counter() - self._start)
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, own)
        self._start_interval()
        slow = self._slow(ranks)
        reported = [text for rank, text in slow.items() if rank in self._was_slow]
        self._was_slow = set(slow)
        return reported

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
        """Describes each slow rank, given host, seconds per call, of loading and of the interval of all ranks."""
        _, computing, loading, whole = zip(*ranks, strict=True)
        usual_computing = statistics.median_low(computing)
        usual_loading = statistics.median_low(loading)
        limit = self._config.straggler_ratio
        found = {}
        for rank, (host, own, own_loading, _) in enumerate(ranks):
            if usual_computing > 0 and own > limit * usual_computing:
                ratio = own / usual_computing
                found[rank] = f"rank {rank} on {host} is slow: {ratio:.1f} x the usual time for the same computation"
            elif own_loading - usual_loading > (1 - 1 / limit) * statistics.median_low(whole):
                share = own_loading / statistics.median_low(whole)
                found[rank] = f"rank {rank} on {host} is slow: loading data takes {share:.0%} of its time"
        return found
