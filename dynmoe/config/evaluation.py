"""Evaluation during training."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import ClassVar, Optional

from dynmoe.errors import ConfigError
from dynmoe.fields import Section, option


@dataclass
class EvalConfig(Section):
    _section: ClassVar[str] = "eval"

    interval: int = option(100, "steps between evaluations (0: only at the end)", at_least=0)
    batches: int = option(10, "number of global batches per evaluation, over all corpora", at_least=1)
    weighting: Optional[str] = option(
        None, "weights of the corpora in eval/loss: their shares of the training data (blend) or of the validation "
        "tokens (tokens); null: as at the start of the run, blend for a new run", choices=("blend", "tokens"),
    )  # fmt: skip
    tasks: list[str] = option(
        [], "lm-evaluation-harness tasks to score during training, by name or YAML file (no generation)"
    )
    domains: bool = option(False, "report validation loss and experts per token of each corpus separately")
    scores_interval: int = option(0, "steps between scorings of tasks and domains (0: only at the end)", at_least=0)
    sample_tokens: int = option(
        96, "length in tokens of the sample text that a finished run prints (0: none)", at_least=0
    )
    limit: Optional[int] = option(None, "maximum number of documents per task; null: all", at_least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.has_scores and self.scores_interval:
            cure = "name eval.tasks, or set eval.domains=true"
            raise ConfigError("eval.scores_interval", self.scores_interval, "there is nothing to score", cure)
        if not self.tasks and self.limit is not None:
            raise ConfigError(
                "eval.limit", self.limit, "there are no tasks to limit", "name eval.tasks or remove the limit"
            )

    @property
    def has_scores(self) -> bool:
        return bool(self.tasks) or self.domains

    def check_installed(self) -> None:
        """Refuses tasks if lm-evaluation-harness is not installed."""
        if self.tasks and importlib.util.find_spec("lm_eval") is None:
            cure = "run pip install 'dynmoe[eval]' or remove the tasks"
            raise ConfigError("eval.tasks", self.tasks, "requires lm_eval, which is not installed", cure)

    def evaluates(self, step: int, steps: int) -> bool:
        """Whether the validation loss is computed after optimizer step ``step`` of ``steps``."""
        return step == steps or (self.interval > 0 and step % self.interval == 0)

    def scores(self, step: int, steps: int) -> bool:
        """Whether tasks and domains are scored after optimizer step ``step`` of ``steps``."""
        return self.has_scores and (step == steps or (self.scores_interval > 0 and step % self.scores_interval == 0))
