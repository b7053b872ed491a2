"""Reads a run directory as far as possible, and reports what is missing or damaged."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dynmoe.config import Config, load_config
from dynmoe.errors import UserError
from dynmoe.train.health import layers_of
from dynmoe.train.metrics import Histograms, Row
from dynmoe.train.run_directory import RunDirectory
from dynmoe.train.scores import Scores, newest_scores

_LARGEST = 2**63
_INCIDENTS = {
    "not finite": "steps skipped as not finite", "spike": "steps skipped as loss spikes",
    "straggler": "intervals with a slow rank",
}  # fmt: skip
_LONGEST_NAME = 200  # of a metric; names may contain a layer's number, and Python limits the digits of integers


@dataclass
class Run:
    """The content of a run directory.

    Attributes:
        name: display name.
        config: the configuration; None if it cannot be read.
        rows: rows of metrics.jsonl, by step.
        histograms: rows of histograms.jsonl, by step.
        events: rows of events.jsonl.
        outcome: content of outcome.json; None while the run is active.
        problems: sentences about what is missing, damaged or unfinished.
    """

    path: Path
    name: str
    config: Config | None = None
    rows: list[Row] = field(default_factory=list)
    histograms: list[Histograms] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    outcome: dict[str, Any] | None = None
    problems: list[str] = field(default_factory=list)

    @property
    def layers(self) -> list[int]:
        """MoE layers that occur in the metrics."""
        return sorted({layer for row in self.rows for layer in layers_of(row)})

    def series(self, metric: str) -> tuple[list[float], list[float | None]]:
        """Steps and values of the rows that have ``metric``; None for values that are not finite."""
        found = [(row["train/step"], row[metric]) for row in self.rows if metric in row]
        values = [value if math.isfinite(value) else None for _, value in found]
        return [step for step, _ in found], values

    @property
    def scores(self) -> dict[str, Scores]:
        """Latest finite scores of every task and domain."""
        finite = {
            name: {figure: value for figure, value in scores.items() if math.isfinite(value)}
            for name, scores in newest_scores(self.rows).items()
        }
        return {name: scores for name, scores in finite.items() if scores}

    def last(self, metric: str) -> float | None:
        """Latest value of ``metric``."""
        return next((row[metric] for row in reversed(self.rows) if metric in row), None)


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Reads several run directories; runs with the same name are named by path.

    Raises:
        UserError: a path is not a run directory.
    """
    runs = [read_run(path) for path in paths]
    names = Counter(run.name for run in runs)
    for run in runs:
        if names[run.name] > 1:
            run.name = str(run.path)
    return runs


def read_run(path: Path) -> Run:
    """Reads a run directory.

    Raises:
        UserError: ``path`` is not a run directory.
    """
    directory = RunDirectory(path)
    run = Run(path, path.resolve().name)
    if not path.is_dir() or not any(p.exists() for p in (directory.config, directory.metrics, directory.checkpoints)):
        raise UserError(f"{path}: contains no run (neither config.yaml nor metrics.jsonl); use a directory of runs/")
    try:
        run.config = load_config(directory.config)
    except UserError as error:
        run.problems.append(str(error))
    run.rows = _read_lines(run, directory.metrics, _is_row, "train/step")
    if run.config is None or run.config.model.moe_layers:
        run.histograms = _read_lines(run, directory.histograms, _is_histograms, "train/step")
    if directory.events.exists():  # only written if experts are added or removed
        run.events = _read_lines(run, directory.events, _is_event)
    if directory.incidents.exists():
        _report_incidents(run, _read_lines(run, directory.incidents, _is_incident))
    _read_outcome(run, directory.outcome)
    _find_gaps(run)
    return run


def _read_lines(run: Run, path: Path, valid: Callable[[Any], bool], key: str | None = None) -> list[Any]:
    """Reads the valid objects of a JSON lines file; with a ``key``, only those in which it increases."""
    try:
        lines = [line for line in path.read_text(errors="replace").split("\n") if line]
    except OSError as error:
        run.problems.append(f"{path.name} cannot be read ({error.strerror})")
        return []
    if not lines and key is not None:
        run.problems.append(f"{path.name} is empty: no step was logged yet")
    kept: list[Any] = []
    damaged: list[int] = []
    repeated: list[int] = []
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            entry = None
        if not valid(entry):
            damaged.append(number)
        elif key is not None and kept and entry[key] <= kept[-1][key]:
            repeated.append(number)
        else:
            kept.append(entry)
    for numbers, what in ((damaged, "damaged"), (repeated, "out of order or repeated")):
        if numbers:
            shown = ", ".join(map(str, numbers[:5])) + (", …" if len(numbers) > 5 else "")
            run.problems.append(f"{path.name}: {len(numbers)} of {len(lines)} lines skipped ({what}): line {shown}")
    return kept


def _is_number(value: Any) -> bool:
    """Whether a value can be drawn; NaN and infinity can, as gaps."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return isinstance(value, float) or abs(value) <= _LARGEST


def _is_count(value: Any) -> bool:
    return _is_number(value) and math.isfinite(value) and value == int(value) >= 0


def _is_row(entry: Any) -> bool:
    if not isinstance(entry, dict) or not _is_count(entry.get("train/step")):
        return False
    return all(len(name) <= _LONGEST_NAME and _is_number(value) for name, value in entry.items())


def _is_counts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_count, value))


def _is_histograms(entry: Any) -> bool:
    if not isinstance(entry, dict) or not _is_count(entry.get("train/step")):
        return False
    layers = entry.get("layers")
    return isinstance(layers, dict) and all(
        layer.isdecimal() and isinstance(own, dict) and {"experts_per_token", "load", "active"} <= own.keys()
        and all(map(_is_counts, own.values())) and len(own["load"]) == len(own["active"]) and any(own["active"])
        for layer, own in layers.items()
    )  # fmt: skip


def _is_event(entry: Any) -> bool:
    return isinstance(entry, dict) and "change" in entry and all(
        _is_count(entry.get(name)) for name in ("step", "layer", "expert")
    )  # fmt: skip


def _is_incident(entry: Any) -> bool:
    return isinstance(entry, dict) and _is_count(entry.get("step")) and all(
        isinstance(entry.get(name), str) for name in ("kind", "text")
    )  # fmt: skip


def _report_incidents(run: Run, incidents: list[dict[str, Any]]) -> None:
    """Adds a sentence for each kind of incident, with the first one."""
    for kind, count in Counter(incident["kind"] for incident in incidents).items():
        first = next(incident for incident in incidents if incident["kind"] == kind)
        what = _INCIDENTS.get(kind, kind)
        run.problems.append(f"{what}: {count}, the first at step {first['step']} ({first['text']})")


def _read_outcome(run: Run, path: Path) -> None:
    try:
        outcome = json.loads(path.read_text())
        if not isinstance(outcome, dict) or "status" not in outcome:
            raise ValueError
        run.outcome = outcome
    except FileNotFoundError:
        last = run.last("train/step")
        of = "" if run.config is None else f" of {run.config.train.steps}"
        seen = "no step was logged" if last is None else f"its last row is step {last:.0f}{of}"
        run.problems.append(f"outcome.json is missing: the run is active, or died without recording why; {seen}")
    except (OSError, ValueError, RecursionError):
        run.problems.append("outcome.json cannot be read")
    if run.outcome is not None and run.outcome["status"] == "failed":
        run.problems.append(f"the run failed: {run.outcome.get('error', 'no reason was recorded')}")
    elif run.outcome is not None and run.outcome["status"] == "preempted":
        run.problems.append(f"the run stopped on request after step {run.outcome.get('step', '?')}, and can be resumed")
    if len(run.rows) == 1:
        run.problems.append("there is only one row: curves are points")


def _find_gaps(run: Run) -> None:
    """Reports missing rows: gaps larger than the logging interval and than the neighbouring gaps.

    A run that starts at a later step (after ``dynmoe.convert``), or changes its interval, is therefore not reported.
    """
    if run.config is None:
        return
    interval = run.config.logging.interval
    steps = [int(row["train/step"]) for row in run.rows]
    apart = [after - before for before, after in itertools.pairwise(steps)]
    gaps = [
        place
        for place, distance in enumerate(apart)
        if distance > max([interval, *apart[max(0, place - 1) : place], *apart[place + 1 : place + 2]])
    ]
    if gaps:
        lacking = sum((apart[place] - 1) // interval for place in gaps)
        run.problems.append(f"metrics.jsonl lacks {lacking} rows, the first after step {steps[gaps[0]]}")
