"""What the first rank of a run writes and shows while it goes on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from dynmoe.moe.adaptation import AdaptationEvent
from dynmoe.train.console import ProgressLine
from dynmoe.train.metrics import Row, View
from dynmoe.train.run_directory import RunDirectory
from dynmoe.train.step_log import StepLog


class RunRecord:
    """``metrics.jsonl`` and its views, ``events.jsonl`` (experts that came and went), and the line on the terminal.

    Args:
        directory: of the run.
        first_step: the step that the run goes on from.
        steps: of the whole run.
        views: shown the rows of the metrics.
    """

    def __init__(self, directory: RunDirectory, first_step: int, steps: int, views: Sequence[View]) -> None:
        self._metrics = StepLog(directory.metrics, "train/step", first_step)
        self._events = StepLog(directory.events, "step", first_step)
        self._views, self._line = views, ProgressLine(steps, first_step)

    @property
    def last_row(self) -> Row:
        return self._metrics.last

    def add_row(self, row: Row) -> None:
        self._metrics.append(row)
        for view in self._views:
            view.log(row)
        self._line.show(row, int(row["train/step"]))

    def add_events(self, events: Sequence[AdaptationEvent]) -> None:
        for event in events:
            self._events.append(dataclasses.asdict(event))

    def close(self) -> None:
        self._line.close()
        self._metrics.close()
        self._events.close()
        for view in self._views:
            view.close()
