"""Weights & Biases as a view of the metrics: never in the way of the training."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import wandb

from dynmoe.errors import first_line
from dynmoe.train.metrics import Row

_INIT_TIMEOUT_S = 10.0
_FINISH_TIMEOUT_S = 60.0


class WandbView:
    """A W&B run, offline or online; online and unreachable within 10 s, it goes on offline and says so.

    Args:
        mode: ``offline`` or ``online``.
        run_id: of an earlier start of the same run, to continue it; None for a new one.
    """

    def __init__(self, mode: str, project: str, name: str, directory: Path, config: dict[str, Any], run_id: str | None):
        self.run_id = run_id or secrets.token_hex(4)
        arguments = {
            "project": project, "name": name, "group": name, "dir": str(directory), "config": config,
            "id": self.run_id, "resume": "allow",
        }  # fmt: skip
        settings = wandb.Settings(
            init_timeout=_INIT_TIMEOUT_S, finish_timeout=_FINISH_TIMEOUT_S, silent=True, console="off"
        )
        try:
            if mode == "online" and not wandb.login(prompt=False, verify=False):
                # init would ask for a key at the terminal, while the other ranks wait.
                raise wandb.errors.UsageError("no API key; wandb login keeps one")
            self._run = wandb.init(mode=mode, settings=settings, **arguments)  # type: ignore[arg-type]
        except Exception as error:  # whatever it is: the training does not depend on it
            print(f"W&B cannot be reached ({first_line(error)}); logging offline into {directory}", flush=True)
            wandb.teardown()  # or the id counts as in use
            self._run = wandb.init(mode="offline", settings=settings, **arguments)  # type: ignore[arg-type]
        self._alive = True
        self._run.define_metric("train/step")
        self._run.define_metric("*", step_metric="train/step")

    def log(self, row: Row) -> None:
        self._guarded(lambda: self._run.log(row))

    def close(self) -> None:
        """Ends the run; when it returns, every row is uploaded or in the offline file."""
        self._guarded(self._finish)

    def _finish(self) -> None:
        self._run.finish()
        # finish only asks W&B's service to close the run's file; the end of the service is waited for.
        wandb.teardown()

    def _guarded(self, action: Callable[[], object]) -> None:
        """Does it, unless W&B failed before; a failure is said once and ends the view, not the training."""
        if not self._alive:
            return
        try:
            action()
        except (Exception, SystemExit) as error:  # teardown leaves by sys.exit when the service failed
            self._alive = False
            print(f"W&B failed ({first_line(error)}); training goes on, metrics.jsonl is complete", flush=True)
