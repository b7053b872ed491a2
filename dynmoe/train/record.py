"""What the first rank of a run writes and shows while it goes on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from dynmoe.config import Config
from dynmoe.errors import first_line
from dynmoe.moe.adaptation import AdaptationEvent
from dynmoe.train.console import RunConsole
from dynmoe.train.health import new_troubles
from dynmoe.train.metrics import Histograms, Row, View
from dynmoe.train.run_directory import RunDirectory
from dynmoe.train.step_log import StepLog
from dynmoe.train.traces import cut_traces


def on_views(views: list[View], action: Callable[[View], None]) -> None:
    """Each view on its own: one that fails is said and left out from then on, and disturbs nobody."""
    for view in list(views):
        try:
            action(view)
        except (Exception, SystemExit) as error:  # W&B leaves by sys.exit when its service failed
            views.remove(view)
            print(f"{view.name} failed ({first_line(error)}); it is left out, metrics.jsonl is complete", flush=True)


class RunRecord:
    """``metrics.jsonl``, ``histograms.jsonl`` and their views, ``events.jsonl`` (experts that came and went),
    ``incidents.jsonl`` (steps that were left out, ranks that are slow), console.

    Whatever an earlier start wrote beyond ``first_step`` is cut off.

    Args:
        config: of the run.
        directory: of the run.
        first_step: the step that the run goes on from.
        views: shown the rows of the metrics.
    """

    def __init__(self, config: Config, directory: RunDirectory, first_step: int, views: Sequence[View]) -> None:
        self._config = config
        self._metrics = StepLog(directory.metrics, "train/step", first_step)
        self._histograms = StepLog(directory.histograms, "train/step", first_step)
        self._events = StepLog(directory.events, "step", first_step)
        self._incidents = StepLog(directory.incidents, "step", first_step)
        cut_traces(directory.traces, first_step)
        self._views, self._console = list(views), RunConsole(config.train.steps, first_step)

    @property
    def last_row(self) -> Row:
        return self._metrics.last

    def add_row(self, row: Row, histograms: Histograms | None) -> None:
        """A row, on some steps with histograms: written first, then shown."""
        before, step = self.last_row, int(row["train/step"])
        self._metrics.append(row)
        if histograms is not None:
            self._histograms.append(histograms)
        on_views(self._views, lambda view: view.log(row, histograms))
        self._console.show(row, step)
        if self._config.logging.shows_table(step):
            self._console.show_layers(row, step)
        for text in new_troubles(before, row, self._config):
            self._console.warn(text, step)

    def add_events(self, events: Sequence[AdaptationEvent]) -> None:
        for event in events:
            self._events.append(dataclasses.asdict(event))

    def add_incident(self, step: int, kind: str, text: str) -> None:
        """``kind``: not finite, spike or straggler."""
        self._incidents.append({"step": step, "kind": kind, "text": text})
        self._console.warn(text, step)

    def close(self) -> None:
        self._console.close()
        for log in (self._metrics, self._histograms, self._events, self._incidents):
            log.close()
        on_views(self._views, lambda view: view.close())
