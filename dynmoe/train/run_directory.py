"""The directory of a run: configuration, tokenizer, metrics, traces, outcome, checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from dynmoe.data.corpus import TOKENIZER
from dynmoe.errors import UserError
from dynmoe.lock import Lock
from dynmoe.train.checkpoint import write_atomically

# A predecessor on another host may still be ending.
PATIENCE_S = 5.0


class RunDirectory:
    """Paths and small files of a run. Only the first rank writes.

    Args:
        path: the directory; made by :meth:`claim`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.tokenizer = path / TOKENIZER
        self.metrics = path / "metrics.jsonl"
        self.histograms = path / "histograms.jsonl"
        self.events = path / "events.jsonl"
        self.incidents = path / "incidents.jsonl"
        self.traces = path / "traces"
        self.checkpoints = path / "checkpoints"
        self.data_index = path / "data_index"
        self.outcome = path / "outcome.json"
        self.logs = path / "logs"
        self.failures = self.logs / "failures"
        self.hangs = self.logs / "hangs"
        self.wandb_id = path / "wandb_id"
        self.verified = path / "verified"
        self._lock: Lock | None = None

    def starts(self, node: int) -> Path:
        """Where node ``node`` takes note of its starts: each in a file of its own, which nobody else writes."""
        return self.logs / f"starts_node_{node}.jsonl"

    def claim(self, patience_s: float = PATIENCE_S) -> None:
        """Makes the directory and holds it for this process until it ends; waits ``patience_s`` for another to end.

        Megatron's index files are removed: one that a kill cut short would be trusted, and they are soon made again.

        Raises:
            UserError: the directory cannot be made or written to, or another job trains in it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = Lock(self.path / ".lock", patience_s)
        except BlockingIOError:
            raise UserError(f"run.name: another job trains in {self.path}; wait for it or use another name") from None
        except OSError as error:
            raise UserError(
                f"run.dir: {error.filename or self.path} cannot be written ({error.strerror}); use another directory"
            ) from None
        shutil.rmtree(self.data_index, ignore_errors=True)

    def release(self) -> None:
        """Lets another process claim the directory."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def begin(self, config_yaml: str, tokenizer: bytes) -> None:
        """Keeps the configuration and the tokenizer, and forgets how an earlier start ended: only this one counts.

        With them a run can be looked at wherever its directory lies.
        """
        write_atomically(self.config, config_yaml)
        write_atomically(self.tokenizer, tokenizer)
        self.outcome.unlink(missing_ok=True)

    def write_outcome(self, status: str, step: int, **facts: Any) -> None:
        """``status``: finished or preempted, by the first rank; failed, by the first rank that fails."""
        if status == "failed" and self.outcome.exists():
            return  # the others fail because one did
        write_atomically(self.outcome, json.dumps({"status": status, "step": step, **facts}, indent=1) + "\n")
