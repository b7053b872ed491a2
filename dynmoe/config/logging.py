"""Configuration of what a run tells: how often, where, and what it warns of."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from typing import ClassVar, Optional

from dynmoe.config.fields import Section, option
from dynmoe.errors import ConfigError


@dataclass
class LoggingConfig(Section):
    _section: ClassVar[str] = "logging"

    interval: int = option(10, "steps between rows of metrics.jsonl", at_least=1)
    histograms_every: int = option(
        10, "rows of metrics.jsonl between entries of histograms.jsonl (experts per token, load of each expert), "
        "counted in logging.interval; 0: only at the end", at_least=0,
    )  # fmt: skip
    table_every: int = option(
        10, "rows of metrics.jsonl between tables of the layers on the console, counted in logging.interval (0: none)",
        at_least=0,
    )  # fmt: skip
    trace_interval: int = option(
        0, "steps between routing traces: every token with its experts and gates, as Parquet (0: none); train.py "
        "--trace: 1", at_least=0,
    )  # fmt: skip
    wandb: str = option("disabled", "Weights & Biases", choices=("disabled", "offline", "online"))
    wandb_project: str = option("dynmoe", "W&B project")
    tensorboard: bool = option(False, "write the metrics for TensorBoard too")
    peak_tflops: Optional[float] = option(None, "peak of one device for train/mfu; null: by GPU name", above=0)
    warn_expert_share: float = option(
        0.9, "warn when one expert computes more than this share of a layer's rows", above=0, at_most=1
    )
    warn_dropped_frac: float = option(
        0.1, "warn when more than this share of a layer's routes is dropped", at_least=0, at_most=1
    )
    warn_budget_deviation: float = option(
        0.2, "warn when experts per token leave the budget by more than this share of it", above=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.wandb != "disabled" and not re.fullmatch(r"[^/\\#?%:]{1,128}", self.wandb_project):
            cure = r"use 1 to 128 characters, none of / \ # ? % :"
            raise ConfigError("logging.wandb_project", self.wandb_project, "is no name that W&B takes", cure)

    def check_installed(self) -> None:
        """Refuses a view whose package is not here."""
        if self.tensorboard and importlib.util.find_spec("tensorboard") is None:
            cure = "install the package tensorboard, or use false"
            raise ConfigError("logging.tensorboard", True, "needs a package that is not here", cure)

    def draws_histograms(self, step: int) -> bool:
        """Whether optimizer step ``step`` is one of those with an entry in histograms.jsonl (the last one is, too)."""
        return self.histograms_every > 0 and step % (self.interval * self.histograms_every) == 0

    def shows_table(self, step: int) -> bool:
        """Whether the console shows the table of the layers after optimizer step ``step``."""
        return self.table_every > 0 and step % (self.interval * self.table_every) == 0

    def traces(self, step: int) -> bool:
        """Whether the routing of optimizer step ``step`` is written."""
        return self.trace_interval > 0 and step % self.trace_interval == 0
