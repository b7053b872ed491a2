"""Configuration of metrics, views and warnings."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from typing import ClassVar, Optional

from dynmoe.errors import ConfigError
from dynmoe.fields import Section, option


@dataclass
class LoggingConfig(Section):
    _section: ClassVar[str] = "logging"

    interval: int = option(10, "steps between rows of metrics.jsonl", at_least=1)
    histograms_every: int = option(
        10, "rows of metrics.jsonl (each logging.interval steps) between entries of histograms.jsonl, which have "
        "experts per token and the load of each expert; 0: only at the end", at_least=0,
    )  # fmt: skip
    table_every: int = option(
        10, "rows of metrics.jsonl (each logging.interval steps) between tables of the layers on the console "
        "(0: none)", at_least=0,
    )  # fmt: skip
    trace_interval: int = option(
        0, "steps between routing traces, which record the experts and gates of every token as Parquet (0: none); "
        "train.py --trace sets 1", at_least=0,
    )  # fmt: skip
    wandb: str = option("disabled", "mode of Weights & Biases (W&B)", choices=("disabled", "offline", "online"))
    wandb_project: str = option("dynmoe", "name of the W&B project")
    tensorboard: bool = option(False, "also write the metrics for TensorBoard")
    peak_tflops: Optional[float] = option(
        None, "peak TFLOP/s of one device, for train/mfu; null: looked up by GPU name", above=0
    )
    warn_expert_share: float = option(
        0.9, "warn if one expert computes more than this fraction of a layer's rows", above=0, at_most=1
    )
    warn_dropped_frac: float = option(
        0.1, "warn if more than this fraction of a layer's routes is dropped", at_least=0, at_most=1
    )
    warn_budget_deviation: float = option(
        0.2, "warn if experts per token deviate from the budget by more than this fraction of it", above=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.wandb != "disabled" and not re.fullmatch(r"[^/\\#?%:]{1,128}", self.wandb_project):
            cure = r"use 1 to 128 characters other than / \ # ? % :"
            raise ConfigError("logging.wandb_project", self.wandb_project, "is not a valid W&B project name", cure)

    def check_installed(self) -> None:
        """Refuses a view whose package is not installed."""
        if self.tensorboard and importlib.util.find_spec("tensorboard") is None:
            cure = "install it or use false"
            raise ConfigError("logging.tensorboard", True, "requires tensorboard, which is not installed", cure)

    def draws_histograms(self, step: int) -> bool:
        """Whether optimizer step ``step`` has an entry in histograms.jsonl; the last step always has one."""
        return self.histograms_every > 0 and step % (self.interval * self.histograms_every) == 0

    def shows_table(self, step: int) -> bool:
        """Whether the console shows the table of the layers after optimizer step ``step``."""
        return self.table_every > 0 and step % (self.interval * self.table_every) == 0

    def traces(self, step: int) -> bool:
        """Whether the routing of optimizer step ``step`` is traced."""
        return self.trace_interval > 0 and step % self.trace_interval == 0
