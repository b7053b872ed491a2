"""Interleaved timing in one process, and the memory of a computation."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from scipy import stats
from torch import Tensor, nn


@dataclass(frozen=True)
class Passes:
    """Seconds of one forward and one backward pass."""

    forward: float
    backward: float

    def of(self, direction: str) -> float:
        return {"forward": self.forward, "backward": self.backward, "both": self.forward + self.backward}[direction]


DIRECTIONS = ("forward", "backward", "both")


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def time_passes(forward: Callable[[], Tensor], backward: Callable[[Tensor], object]) -> Passes:
    """Times one forward pass and the backward pass from its output."""
    _synchronize()
    start = time.perf_counter()
    output = forward()
    _synchronize()
    middle = time.perf_counter()
    backward(output)
    _synchronize()
    return Passes(middle - start, time.perf_counter() - middle)


def interleave(methods: Mapping[str, Callable[[], Passes]], repeats: int) -> dict[str, list[Passes]]:
    """Runs every method once to warm up, then ``repeats`` times in turn, so that disturbances affect all of them.

    Each turn begins with another method, so none always runs after the same one with warm caches.
    """
    for run in methods.values():
        run()
    times: dict[str, list[Passes]] = {name: [] for name in methods}
    names = list(methods)
    for turn in range(repeats):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(methods[name]())
    return times


def median_ratio(times: Iterable[Passes], floor: Iterable[Passes], direction: str) -> float:
    """Median over turns of the ratio to the floor in the same turn."""
    return statistics.median(a.of(direction) / b.of(direction) for a, b in zip(times, floor, strict=True))


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the median by order statistics, which assumes no distribution."""
    interval = stats.quantile_test(values, p=0.5).confidence_interval()
    return float(interval.low), float(interval.high)


def waits(run: Callable[[], object]) -> int:
    """How often the host waits for the GPU during ``run``; 0 without a GPU."""
    if not torch.cuda.is_available():
        run()
        return 0
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(warning.message) for warning in said)


def saved_bytes(forward: Callable[[], Tensor], module: nn.Module) -> int:
    """Bytes that autograd saves for the backward pass, without parameters, counting shared storage once."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        detached = tensor.detach()  # with its place in the graph, the graph would keep itself in memory
        storage = detached.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(detached)  # else its address could be reused
        return detached

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    del output
    return sum(kept.values())
