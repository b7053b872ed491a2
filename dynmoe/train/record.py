"""The logs that rank 0 writes and shows during a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from dynmoe.config import Config
from dynmoe.errors import first_line
from dynmoe.moe.adaptation import AdaptationEvent
from dynmoe.train.console import RunConsole
from dynmoe.train.health import new_problems
from dynmoe.train.metrics import Histograms, Row, View
from dynmoe.train.run_directory import RunDirectory
from dynmoe.train.step_log import StepLog
from dynmoe.train.traces import cut_traces


def on_views(views: list[View], action: Callable[[View], None]) -> None:
    """Runs ``action`` on each view; a view that fails is reported once and removed."""
    for view in list(views):
        try:
            action(view)
        except (Exception, SystemExit) as error:  # W&B calls sys.exit when its service has failed
            views.remove(view)
            print(f"{view.name} failed ({first_line(error)}) and is disabled; metrics.jsonl is complete", flush=True)


class RunRecord:
    """``metrics.jsonl``, ``histograms.jsonl`` and their views, ``events.jsonl`` (experts added and removed),
    ``incidents.jsonl`` (skipped steps, slow ranks) and the console.

    Entries that an earlier start wrote after ``first_step`` are removed.

    Args:
        config: configuration of the run.
        directory: directory of the run.
        first_step: the step from which the run resumes.
        views: views of the metrics.
    """

    def __init__(self, config: Config, directory: RunDirectory, first_step: int, views: Sequence[View]) -> None:
        self._config = config
        self._metrics = StepLog(directory.metrics, "train/step", first_step)
        self._histograms = StepLog(directory.histograms, "train/step", first_step)
        self._events = StepLog(directory.events, "step", first_step)
        self._incidents = StepLog(directory.incidents, "step", first_step)
        cut_traces(directory.traces, first_step)
        self._views = list(views)
        self._console = RunConsole(config.train.steps, first_step)

    @property
    def last_row(self) -> Row:
        return self._metrics.last

    def add_row(self, row: Row, histograms: Histograms | None) -> None:
        """Writes a row, for some steps with histograms, and then shows it."""
        before = self.last_row
        step = int(row["train/step"])
        self._metrics.append(row)
        if histograms is not None:
            self._histograms.append(histograms)
        on_views(self._views, lambda view: view.log(row, histograms))
        self._console.show(row, step)
        if self._config.logging.shows_table(step):
            self._console.show_layers(row, step)
        for text in new_problems(before, row, self._config):
            self._console.warn(text, step)

    def add_events(self, events: Sequence[AdaptationEvent]) -> None:
        for event in events:
            self._events.append(dataclasses.asdict(event))

    def add_incident(self, step: int, kind: str, text: str) -> None:
        """Records an incident of a kind: not finite, spike or straggler."""
        self._incidents.append({"step": step, "kind": kind, "text": text})
        self._console.warn(text, step)

    def close(self) -> None:
        self._console.close()
        for log in (self._metrics, self._histograms, self._events, self._incidents):
            log.close()
        on_views(self._views, lambda view: view.close())
