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

# A previous job on another host may still be exiting.
PATIENCE_S = 5.0


class RunDirectory:
    """Paths and small files of a run. Only rank 0 writes them.

    Args:
        path: the directory; created by :meth:`claim`.
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
        """The file in which node ``node``, and no other, records its starts."""
        return self.logs / f"starts_node_{node}.jsonl"

    def claim(self, patience_s: float = PATIENCE_S) -> None:
        """Creates the directory and locks it for this process; waits up to ``patience_s`` for another job to exit.

        Index files of the sample order are removed: an interrupted start may have left a truncated one.

        Raises:
            UserError: the directory cannot be created or written to, or another job is training in it.
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
        """Releases the lock, so that another process can claim the directory."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def begin(self, config_yaml: str, tokenizer: bytes) -> None:
        """Writes the configuration and the tokenizer, which make the directory self-contained; removes the outcome."""
        write_atomically(self.config, config_yaml)
        write_atomically(self.tokenizer, tokenizer)
        self.outcome.unlink(missing_ok=True)

    def write_outcome(self, status: str, step: int, **facts: Any) -> None:
        """Writes the outcome: finished or preempted by rank 0, failed by the first rank that fails."""
        if status == "failed" and self.outcome.exists():
            return  # other ranks fail as a consequence
        write_atomically(self.outcome, json.dumps({"status": status, "step": step, **facts}, indent=1) + "\n")
