"""Confidence intervals of mean differences between paired runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

CONFIDENCE = 0.95
# Resampled means lie between the smallest and the largest difference, which for fewer pairs are too close together.
_FEWEST_PAIRS = 5
_RESAMPLES = 20_000


class Interval(NamedTuple):
    """Mean of paired differences and its interval; the ends are None for fewer than five pairs."""

    mean: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        ends = "" if self.low is None or self.high is None else f" [{self.low:+.3f}, {self.high:+.3f}]"
        return f"{self.mean:+.3f}{ends}".replace("-", "−")

    @property
    def verdict(self) -> str:
        """``lower`` or ``higher`` if the interval excludes 0, else ``undecided``."""
        if self.low is None or self.high is None or self.low <= 0 <= self.high:
            return "undecided"
        return "lower" if self.high < 0 else "higher"


def interval_of(differences: Sequence[float]) -> Interval:
    """The mean of ``differences``, one for each pair of runs, with its 95 % interval."""
    mean = float(np.mean(differences))
    if len(differences) < _FEWEST_PAIRS:
        return Interval(mean, None, None)
    low, high = bootstrap(differences)
    return Interval(mean, float(low), float(high))


def bootstrap(samples_xN: ArrayLike, resamples: int = _RESAMPLES) -> tuple[NDArray, NDArray]:
    """95 % intervals of the means over the last axis by the expanded percentile bootstrap.

    Percentiles of resampled means are too narrow for few pairs. The expanded percentile bootstrap (Hesterberg, arXiv
    1411.5279) takes percentiles further out, such that the interval of normal data is as wide as Student's.
    """
    samples_xN = np.asarray(samples_xN)
    pairs = samples_xN.shape[-1]
    reach = math.sqrt(pairs / (pairs - 1)) * stats.t.ppf(0.5 + CONFIDENCE / 2, pairs - 1)
    found = stats.bootstrap(
        (samples_xN,), np.mean, axis=-1, confidence_level=1 - 2 * stats.norm.cdf(-reach), n_resamples=resamples,
        method="percentile", batch=1000, rng=np.random.default_rng(0),
    )  # fmt: skip
    return found.confidence_interval.low, found.confidence_interval.high
