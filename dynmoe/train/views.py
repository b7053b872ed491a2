"""Creation of the configured views of the metrics."""

from __future__ import annotations

from dynmoe.config import Config
from dynmoe.train.metrics import Pictures, View
from dynmoe.train.run_directory import RunDirectory


def make_views(
    config: Config, directory: RunDirectory, pictures: Pictures, run_id: str | None, first_step: int
) -> tuple[list[View], str | None]:
    """Creates the views; returns them and the W&B id of the run.

    Args:
        config: configuration of the run.
        directory: directory of the run.
        pictures: draws the report's figures of a run directory, by name.
        run_id: W&B id of an earlier start; None if there was none.
        first_step: the step from which the run resumes.
    """
    views: list[View] = []
    if config.logging.tensorboard:  # the package of a view is imported only if needed
        from dynmoe.train.tensorboard_view import TensorBoardView

        views.append(TensorBoardView(directory.path / "tensorboard", first_step))
    if config.logging.wandb != "disabled":
        from dynmoe.train.wandb_view import WandbView

        wandb = WandbView(config, directory, pictures, run_id)
        views.append(wandb)
        run_id = wandb.run_id
    return views, run_id
