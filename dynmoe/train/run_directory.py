"""The directory of a run: configuration, tokenizer, metrics, traces, outcome, checkpoints."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dynmoe.data.sentencepiece_tokenizer import TOKENIZER_MODEL
from dynmoe.data.tokenizer_files import find_tokenizer
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

    @property
    def tokenizer(self) -> Path:
        """Main file of the tokenizer; one that does not exist if there is none."""
        return find_tokenizer(self.path) or self.path / TOKENIZER_MODEL

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

    def begin(self, config_yaml: str, tokenizer: Mapping[str, bytes]) -> None:
        """Writes the configuration and the tokenizer, which make the directory self-contained; removes the outcome.

        Args:
            config_yaml: the merged configuration.
            tokenizer: contents of the tokenizer's files by name, the main file first.
        """
        write_atomically(self.config, config_yaml)
        for name, content in reversed([*tokenizer.items()]):  # the main file last: with it there is a tokenizer
            write_atomically(self.path / name, content)
        self.outcome.unlink(missing_ok=True)

    def write_outcome(self, status: str, step: int, **facts: Any) -> None:
        """Writes the outcome: finished or preempted by rank 0, failed by the first rank that fails."""
        if status == "failed" and self.outcome.exists():
            return  # other ranks fail as a consequence
        write_atomically(self.outcome, json.dumps({"status": status, "step": step, **facts}, indent=1) + "\n")
