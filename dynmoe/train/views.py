"""The views of the metrics that a configuration asks for."""

from __future__ import annotations

import dataclasses

from dynmoe.config import Config
from dynmoe.train.metrics import View


def make_views(config: Config, run_id: str | None) -> tuple[list[View], str | None]:
    """The views, and the id under which W&B knows the run (``run_id`` where an earlier start has one)."""
    if config.logging.wandb == "disabled":
        return [], run_id
    from dynmoe.train.wandb_view import WandbView  # W&B is imported only where it is asked for

    view = WandbView(
        config.logging.wandb, config.logging.wandb_project, config.run.name, config.run.path,
        dataclasses.asdict(config), run_id,
    )  # fmt: skip
    return [view], view.run_id
