"""The directory of a run: configuration, metrics, outcome, checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dynmoe.errors import UserError
from dynmoe.train.checkpoint import write_atomically


class RunDirectory:
    """Paths and small files of a run. Only the first rank writes.

    Args:
        path: the directory; made by :meth:`create`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.data_index = path / "data_index"
        self._outcome = path / "outcome.json"

    def create(self, config_yaml: str) -> None:
        """Makes the directory and keeps the merged configuration in it.

        Raises:
            UserError: the directory cannot be made or written to.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path / "config.yaml", config_yaml)
        except OSError as error:
            raise UserError(
                f"run.dir: {error.filename or self.path} cannot be written ({error.strerror}); use another directory"
            ) from None

    def read_outcome(self) -> dict[str, Any] | None:
        """What the last start of this run ended with; None where it did not end or never started."""
        try:
            outcome = json.loads(self._outcome.read_text())
        except (FileNotFoundError, ValueError):
            return None
        return outcome if isinstance(outcome, dict) else None

    def clear_outcome(self) -> None:
        """Forgets how an earlier start ended: from here on only this start's end counts."""
        self._outcome.unlink(missing_ok=True)

    def write_outcome(self, status: str, step: int, **facts: Any) -> None:
        """``status``: finished, preempted or failed."""
        write_atomically(self._outcome, json.dumps({"status": status, "step": step, **facts}, indent=1) + "\n")
