"""Watches memory and file descriptors of a run's ranks; growth is counted within a process, after its warm-up."""

from __future__ import annotations

import contextlib
import statistics
import threading
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import psutil

from bench.disturbed import DisturbedRun, LastStep

_LOOK_S = 0.5
# For each process: time in which allocators and caches settle.
_WARM_UP_STEPS = 1000


@dataclass(frozen=True)
class _Look:
    step: int
    resident_mb: float
    descriptors: int


class MemoryWatch(threading.Thread):
    """Samples the ranks of a run twice a second within its context."""

    def __init__(self, run: DisturbedRun) -> None:
        super().__init__(name="memory", daemon=True)
        self._run = run
        self._last_step = LastStep(run.metrics)
        self._looks: dict[int, list[_Look]] = defaultdict(list)
        self._end = threading.Event()

    def __enter__(self) -> MemoryWatch:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self.join()

    def run(self) -> None:
        while not self._end.wait(_LOOK_S):
            step = self._last_step.read()
            for pid in self._run.training.ranks():
                with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                    process = psutil.Process(pid)
                    look = _Look(step, process.memory_info().rss / 1e6, process.num_fds())
                    self._looks[pid].append(look)

    @property
    def lives(self) -> int:
        """Number of processes seen."""
        return len(self._looks)

    @property
    def measured(self) -> int:
        """Processes that lived longer than their warm-up."""
        return len(self._after_warm_up())

    def slope(self) -> float:
        """Growth of resident memory in MB per 1,000 steps: one slope for all processes, an offset for each."""
        return 1000 * _common_slope(
            [(look.step, look.resident_mb) for look in looks] for looks in self._after_warm_up()
        )

    def descriptors_gained(self) -> int:
        """Largest growth of open files (the minimum of each half) from the first to the second half of a process."""
        gained = [0]
        for looks in self._after_warm_up():
            halves = looks[: len(looks) // 2], looks[len(looks) // 2 :]
            first, second = (min(look.descriptors for look in half) for half in halves)
            gained.append(second - first)
        return max(gained)

    def _after_warm_up(self) -> list[list[_Look]]:
        lives = []
        for looks in self._looks.values():
            warm = [look for look in looks if look.step >= looks[0].step + _WARM_UP_STEPS]
            if len(warm) >= 4:
                lives.append(warm)
        return lives


def _common_slope(groups: Iterable[list[tuple[float, float]]]) -> float:
    """Least-squares slope over groups of points (x, y) with an offset for each group."""
    products = 0.0
    squares = 0.0
    for points in groups:
        middle_x, middle_y = (statistics.fmean(values) for values in zip(*points, strict=True))
        products += sum((x - middle_x) * (y - middle_y) for x, y in points)
        squares += sum((x - middle_x) ** 2 for x, _ in points)
    return products / squares if squares else float("nan")
