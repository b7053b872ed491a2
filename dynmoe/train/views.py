"""Creation of the configured views of the metrics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dynmoe.config import Config
from dynmoe.errors import first_line
from dynmoe.train.metrics import Pictures, View
from dynmoe.train.run_directory import RunDirectory


def make_views(
    config: Config, directory: RunDirectory, pictures: Pictures, run_id: str | None, first_step: int | None
) -> tuple[list[View], str | None]:
    """Creates the views; returns them and the W&B id of the run. A view that cannot be created is left out.

    Args:
        config: configuration of the run.
        directory: directory of the run.
        pictures: draws the report's figures of a run directory, by name.
        run_id: W&B id of an earlier start; None if there was none.
        first_step: the step from which the run resumes; None if it does not, but only adds to its metrics.
    """
    views: list[View] = []
    if config.logging.tensorboard:  # the package of a view is imported only if needed
        from dynmoe.train.tensorboard_view import TensorBoardView

        tensorboard = _attempt("TensorBoard", lambda: TensorBoardView(directory.path / "tensorboard", first_step))
        views += [] if tensorboard is None else [tensorboard]
    if config.logging.wandb != "disabled":
        from dynmoe.train.wandb_view import WandbView

        wandb = _attempt("W&B", lambda: WandbView(config, directory, pictures, run_id))
        if wandb is not None:
            views.append(wandb)
            run_id = wandb.run_id
    return views, run_id


def _attempt(name: str, create: Callable[[], Any]) -> Any:
    """The view; if it fails, as when a service cannot start, says so and returns None."""
    try:
        return create()
    except (Exception, SystemExit) as error:
        print(f"{name} failed ({first_line(error)}); it does not show this start of the run", flush=True)
        return None
