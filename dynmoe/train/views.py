"""The views of the metrics that a configuration asks for."""

from __future__ import annotations

from dynmoe.config import Config
from dynmoe.train.metrics import Pictures, View
from dynmoe.train.run_directory import RunDirectory


def make_views(
    config: Config, directory: RunDirectory, pictures: Pictures, run_id: str | None, first_step: int
) -> tuple[list[View], str | None]:
    """The views, and the id under which W&B knows the run.

    Args:
        config: of the run.
        directory: of the run.
        pictures: draws the report's figures of a run directory, by name.
        run_id: what W&B knew an earlier start by; None where there was none.
        first_step: the step that the run goes on from.
    """
    views: list[View] = []
    if config.logging.tensorboard:  # each view's package is imported only where it is asked for
        from dynmoe.train.tensorboard_view import TensorBoardView

        views.append(TensorBoardView(directory.path / "tensorboard", first_step))
    if config.logging.wandb != "disabled":
        from dynmoe.train.wandb_view import WandbView

        wandb = WandbView(config, directory, pictures, run_id)
        views.append(wandb)
        run_id = wandb.run_id
    return views, run_id
