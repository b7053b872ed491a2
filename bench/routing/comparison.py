"""Which units a comparison needs, and what they show."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from scipy import stats

from bench.routing.intervals import Interval, interval_of
from bench.routing.methods import REFERENCE
from bench.routing.units import Cell, Outcome, Unit

FLOPS_TOLERANCE = 0.01
_MATCHING_TRIES = 4
# Seeds of the sweep are none of those compared: the choice of the learning rate must not profit from their noise.
_SWEEP_SEED = 1000


@dataclass(frozen=True)
class Plan:
    """What is compared. Within a cell, all runs with the same seed share initial weights and the order of the data.

    Attributes:
        swept_on: corpus whose units select the learning rate for each method and width.
        steps: optimizer steps of every run with matched tokens.
    """

    methods: Sequence[str]
    cells: Sequence[Cell]
    learning_rates: Sequence[float]
    swept_on: str
    seeds: int
    steps: int


@dataclass(frozen=True)
class Pair:
    """The units of one method and seed, as far as they are trained.

    Attributes:
        tokens: the unit that has as many tokens as the reference.
        flops: the unit that has as many measured FLOPs, within 1 %; the same if that one has.
        missing: the unit to train next, None if both are there.
    """

    tokens: Outcome | None = None
    flops: Outcome | None = None
    missing: Unit | None = None


class Comparison:
    """Reads the units of a plan by ``get``, which returns None for a unit that is not trained."""

    def __init__(self, plan: Plan, get: Callable[[Unit], Outcome | None]) -> None:
        self.plan = plan
        self._get = get

    def missing(self) -> Iterator[Unit]:
        """Units that can be trained now, the most urgent first: cell by cell, the sweep before the comparison."""
        for cell in self.plan.cells:
            sweep = Cell(cell.width, self.plan.swept_on)
            for method in self.plan.methods:
                yield from (unit for unit in self._sweep(sweep, method) if self._get(unit) is None)
            for seed in range(self.plan.seeds):
                for method in self.plan.methods:
                    if (unit := self.pair(cell, method, seed).missing) is not None:
                        yield unit

    def _sweep(self, cell: Cell, method: str) -> list[Unit]:
        return [Unit(cell, method, rate, _SWEEP_SEED, self.plan.steps) for rate in self.plan.learning_rates]

    def learning_rate(self, width: int, method: str) -> float | None:
        """The swept learning rate with the lowest validation loss; None before the sweep is complete."""
        units = self._sweep(Cell(width, self.plan.swept_on), method)
        found = [(outcome.loss, unit.learning_rate) for unit in units if (outcome := self._get(unit)) is not None]
        return min(found)[1] if len(found) == len(units) else None

    def pair(self, cell: Cell, method: str, seed: int) -> Pair:
        """The units of ``method`` with ``seed``.

        To match FLOPs, the number of steps is divided by the ratio of the FLOPs per step. As the experts per token
        change over a training, a few tries may be needed.
        """
        rates = self.learning_rate(cell.width, REFERENCE), self.learning_rate(cell.width, method)
        if rates[0] is None or rates[1] is None:
            return Pair()
        reference = Unit(cell, REFERENCE, rates[0], seed, self.plan.steps)
        target = self._get(reference)
        if target is None:
            return Pair(missing=reference if method == REFERENCE else None)
        unit = Unit(cell, method, rates[1], seed, self.plan.steps)
        outcome = first = self._get(unit)
        for _ in range(_MATCHING_TRIES):
            if outcome is None:
                return Pair(first, missing=unit)
            if abs(outcome.flops / target.flops - 1) <= FLOPS_TOLERANCE:
                return Pair(first, outcome)
            unit = replace(unit, steps=round(unit.steps * target.flops / outcome.flops))
            outcome = self._get(unit)
        return Pair(first)

    def rows(self) -> Iterator[dict[str, Any]]:
        """A row for each cell and method with at least one complete pair."""
        for cell in self.plan.cells:
            for method in self.plan.methods:
                seeds = range(self.plan.seeds)
                pairs = [(self.pair(cell, method, seed), self.pair(cell, REFERENCE, seed)) for seed in seeds]
                by_tokens = [(own.tokens, top.tokens) for own, top in pairs if own.tokens and top.tokens]
                by_flops = [(own.flops, top.flops) for own, top in pairs if own.flops and top.flops]
                if by_tokens:
                    yield _row(cell, method, self.learning_rate(cell.width, method), by_tokens, by_flops)


_Compared = Sequence[tuple[Outcome, Outcome]]


def _row(
    cell: Cell, method: str, learning_rate: float | None, by_tokens: _Compared, by_flops: _Compared
) -> dict[str, Any]:
    own = [outcome for outcome, _ in by_tokens]
    by_layer = zip(*(outcome.experts_settled for outcome in own), strict=True)
    row = {
        "width": cell.width,
        "corpus": cell.corpus,
        "method": method,
        "learning_rate": learning_rate,
        "loss": statistics.mean(outcome.loss for outcome in own),
        "experts": statistics.mean(outcome.experts for outcome in own),
        "experts_by_layer_at_end": " ".join(f"{statistics.mean(layer):.2f}" for layer in by_layer),
        "experts_evaluated": statistics.mean(outcome.experts_evaluated for outcome in own),
        "load_max_over_mean": statistics.mean(outcome.load_max_over_mean for outcome in own),
        "pairs": len(by_tokens),
        "flops_ratio": statistics.mean(outcome.flops / top.flops for outcome, top in by_tokens),
        "same_tokens": _difference(by_tokens),
    }
    if by_flops:
        ratio = statistics.mean(outcome.tokens / top.tokens for outcome, top in by_flops)
        row |= {"pairs_of_same_flops": len(by_flops), "tokens_ratio": ratio, "same_flops": _difference(by_flops)}
    return row


def _difference(pairs: _Compared) -> Interval:
    """Validation loss minus that of the reference with the same seed."""
    return interval_of([outcome.loss - top.loss for outcome, top in pairs])


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    """What holds in every cell, and how far the order of the methods agrees between cells."""
    by_cell: dict[Cell, dict[str, dict[str, Any]]] = {}
    for row in rows:
        if "same_flops" in row and row["method"] != REFERENCE:
            by_cell.setdefault(Cell(row["width"], row["corpus"]), {})[row["method"]] = row
    lines = []
    for verdict in ("lower", "higher"):
        everywhere = [
            method
            for method in next(iter(by_cell.values()), {})
            if all(method in own and own[method]["same_flops"].verdict == verdict for own in by_cell.values())
        ]
        where = f"in all {len(by_cell)} cells" if len(by_cell) > 1 else "in the one cell"
        lines.append(f"loss {verdict} than {REFERENCE} at equal FLOPs {where}: {', '.join(everywhere) or 'none'}")
    cells = list(by_cell)
    for place, first in enumerate(cells):
        for second in cells[place + 1 :]:
            common = [method for method in by_cell[first] if method in by_cell[second]]
            if len(common) > 2:
                means = [[by_cell[cell][method]["same_flops"].mean for method in common] for cell in (first, second)]
                tau = stats.kendalltau(*means).statistic
                lines.append(f"order of {len(common)} methods, {first} and {second}: Kendall's tau {tau:.2f}")
    return lines
