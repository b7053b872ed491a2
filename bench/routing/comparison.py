"""Which units a comparison needs, and what they show."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

from scipy import stats

from bench.routing.intervals import Interval, interval_of
from bench.routing.methods import REFERENCE, REFERENCES, RENORMALIZED
from bench.routing.units import Cell, Outcome, Unit

FLOPS_TOLERANCE = 0.01
_MATCHING_TRIES = 8
# While the best learning rate is the smallest or the largest, the next one is tried too: half or twice as large.
_FURTHER_RATES = 2
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
        flops: the unit that has as many measured FLOPs, within 1 %; the same if that one has. None also if the search
            for the number of steps found none.
        missing: the unit to train next; None if there is nothing left to train.
    """

    tokens: Outcome | None = None
    flops: Outcome | None = None
    missing: Unit | None = None

    @property
    def is_complete(self) -> bool:
        return self.tokens is not None and self.missing is None


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
        """Units of the swept learning rates, so far: further rates follow while the best is the smallest or largest."""
        rates = sorted(self.plan.learning_rates)
        for _ in range(_FURTHER_RATES + 1):
            units = [Unit(cell, method, rate, _SWEEP_SEED, self.plan.steps) for rate in rates]
            losses = [outcome.loss for unit in units if (outcome := self._get(unit)) is not None]
            if len(losses) < len(units):
                break
            best = losses.index(min(losses))
            if best == 0:
                rates = [rates[0] / 2, *rates]
            elif best == len(rates) - 1:
                rates = [*rates, 2 * rates[-1]]
            else:
                break
        return units

    def learning_rate(self, width: int, method: str) -> float | None:
        """The swept learning rate with the lowest validation loss; None before the sweep is complete."""
        units = self._sweep(Cell(width, self.plan.swept_on), method)
        found = [(outcome.loss, unit.learning_rate) for unit in units if (outcome := self._get(unit)) is not None]
        return min(found)[1] if len(found) == len(units) else None

    def pair(self, cell: Cell, method: str, seed: int) -> Pair:
        """The units of ``method`` with ``seed``."""
        rates = self.learning_rate(cell.width, REFERENCE), self.learning_rate(cell.width, method)
        if rates[0] is None or rates[1] is None:
            return Pair()
        reference = Unit(cell, REFERENCE, rates[0], seed, self.plan.steps)
        target = self._get(reference)
        if target is None:
            return Pair(missing=reference if method == REFERENCE else None)
        unit = Unit(cell, method, rates[1], seed, self.plan.steps)
        return Pair(self._get(unit), *self._matched(unit, target.flops))

    def _matched(self, unit: Unit, flops: int) -> tuple[Outcome | None, Unit | None]:
        """The run like ``unit`` with the number of steps that has as many FLOPs, or the unit to train next.

        Experts per token change over a training, so a few tries may be needed.
        """
        ratios: dict[int, float] = {}
        for _ in range(_MATCHING_TRIES):
            outcome = self._get(unit)
            if outcome is None:
                return None, unit
            ratio = outcome.flops / flops
            if abs(ratio - 1) <= FLOPS_TOLERANCE:
                return outcome, None
            ratios[unit.steps] = ratio
            steps = _next_steps(unit.steps, ratios)
            if steps in ratios:
                break
            unit = replace(unit, steps=steps)
        return None, None

    def rows(self) -> Iterator[dict[str, Any]]:
        """A row for each cell and method with at least one complete pair."""
        for cell in self.plan.cells:
            pairs = {
                method: [self.pair(cell, method, seed) for seed in range(self.plan.seeds)]
                for method in self.plan.methods
            }
            is_complete = all(pair.is_complete for own in pairs.values() for pair in own)
            for method, own in pairs.items():
                if any(pair.tokens for pair in own):
                    rate = self.learning_rate(cell.width, method)
                    facts = {"width": cell.width, "corpus": cell.corpus, "cell_is_complete": is_complete}
                    yield facts | {"method": method, "learning_rate": rate} | _row(own, pairs)


def _next_steps(last: int, ratios: dict[int, float]) -> int:
    """The number of steps to try after ``last``, given the ratio of FLOPs for each number that was tried.

    The number is divided by its ratio. Once one run has too few FLOPs and another too many, it must lie between them;
    else a line through both decides.

    Returns:
        A number that was tried, if none is left between two runs.
    """
    steps = round(last / ratios[last])
    below = max(((ratio, tried) for tried, ratio in ratios.items() if ratio < 1), default=None)
    above = min(((ratio, tried) for tried, ratio in ratios.items() if ratio > 1), default=None)
    if below is None or above is None:
        return steps
    low, high = sorted((below[1], above[1]))
    if not low < steps < high:
        steps = round(below[1] + (above[1] - below[1]) * (1 - below[0]) / (above[0] - below[0]))
    return min(max(steps, low + 1), high - 1) if high - low > 1 else low


def _row(own: Sequence[Pair], pairs: Mapping[str, Sequence[Pair]]) -> dict[str, Any]:
    """What the pairs of a method show, next to those of both references."""
    units = [pair.tokens for pair in own if pair.tokens is not None]
    by_layer = zip(*(unit.experts_settled for unit in units), strict=True)
    targets = [(pair, top.flops) for pair, top in zip(own, pairs[REFERENCE], strict=True) if top.flops is not None]
    row = {
        "loss": statistics.mean(unit.loss for unit in units),
        "experts": statistics.mean(unit.experts for unit in units),
        "experts_by_layer_at_end": " ".join(f"{statistics.mean(layer):.2f}" for layer in by_layer),
        "experts_evaluated": statistics.mean(unit.experts_evaluated for unit in units),
        "load_max_over_mean": statistics.mean(unit.load_max_over_mean for unit in units),
        "seeds": len(own),
        "pairs": len(units),
        "pairs_to_come": sum(not pair.is_complete for pair in own),
        "pairs_without_match": sum(pair.is_complete and pair.flops is None for pair in own),
        "flops_ratio": statistics.mean(pair.tokens.flops / top.flops for pair, top in targets if pair.tokens),
        "same_tokens": _difference(own, pairs[REFERENCE], attrgetter("tokens")),
    }
    if any(pair.flops for pair in own):
        row["tokens_ratio"] = statistics.mean(pair.flops.tokens / top.tokens for pair, top in targets if pair.flops)
        row["same_flops"] = _difference(own, pairs[REFERENCE], attrgetter("flops"))
        if any(pair.flops and top.flops for pair, top in zip(own, pairs[RENORMALIZED], strict=True)):
            row["same_flops_renormalized"] = _difference(own, pairs[RENORMALIZED], attrgetter("flops"))
    return row


def _difference(own: Sequence[Pair], reference: Sequence[Pair], which: Callable[[Pair], Outcome | None]) -> Interval:
    """Validation loss minus that of the reference with the same seed."""
    both = [(which(pair), which(top)) for pair, top in zip(own, reference, strict=True)]
    return interval_of([mine.loss - theirs.loss for mine, theirs in both if mine and theirs])


def _verdict(row: dict[str, Any]) -> str:
    """``lower`` or ``higher`` if the intervals of both differences at equal FLOPs say so, else ``undecided``."""
    found = {row[key].verdict for key in ("same_flops", "same_flops_renormalized") if key in row}
    return found.pop() if len(found) == 1 else "undecided"


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    """What holds in every complete cell, and how far the order of the methods agrees between them."""
    by_cell: dict[Cell, dict[str, dict[str, Any]]] = {}
    lines = []
    for row in rows:
        by_cell.setdefault(Cell(row["width"], row["corpus"]), {})[row["method"]] = row
    for cell, own in list(by_cell.items()):
        if not own[REFERENCE]["cell_is_complete"]:
            lines.append(f"{cell}: not complete, so without influence on the next lines")
            del by_cell[cell]
    cells = list(by_cell)
    if not cells:
        return lines
    where = f"in all {len(cells)} cells" if len(cells) > 1 else f"in the one cell ({cells[0]})"
    for verdict in ("lower", "higher"):
        everywhere = [
            method
            for method in by_cell[cells[0]]
            if method not in REFERENCES and all(_verdict(own[method]) == verdict for own in by_cell.values())
        ]
        names = "; ".join(everywhere) or "none"
        lines.append(f"loss {verdict} than both forms of top-2 at equal FLOPs {where}: {names}")
    for first, second in itertools.combinations(cells, 2):
        means = [
            (by_cell[first][method]["same_flops"].mean, by_cell[second][method]["same_flops"].mean)
            for method in by_cell[first]
            if method != REFERENCE and not any(by_cell[cell][method]["pairs_without_match"] for cell in (first, second))
        ]
        tau = stats.kendalltau(*zip(*means, strict=True)).statistic
        lines.append(f"order of the {len(means)} methods with all pairs, {first} and {second}: Kendall's tau {tau:.2f}")
    return lines
