"""What a run is measured by while it trains."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import ClassVar, Optional

from dynmoe.config.fields import Section, option
from dynmoe.errors import ConfigError


@dataclass
class EvalConfig(Section):
    _section: ClassVar[str] = "eval"

    interval: int = option(100, "steps between evaluations (0: only at the end)", at_least=0)
    batches: int = option(10, "global batches of one evaluation, over all corpora together", at_least=1)
    weighting: Optional[str] = option(
        None, "what weights the corpora in eval/loss: their shares in training (blend) or of the validation tokens "
        "(tokens); null: what the run began with, blend for a new one", choices=("blend", "tokens"),
    )  # fmt: skip
    tasks: list[str] = option(
        [], "tasks of lm-evaluation-harness that are scored while training, by name or YAML file (no generation)"
    )
    domains: bool = option(False, "validation loss of each corpus by itself, with its experts per token")
    scores_interval: int = option(0, "steps between scores of tasks and domains (0: only at the end)", at_least=0)
    sample_tokens: int = option(96, "tokens of the text that a finished run writes (0: none)", at_least=0)
    limit: Optional[int] = option(None, "documents of each task that are scored; null: all", at_least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.has_scores and self.scores_interval:
            problem, cure = "there is nothing to score", "name eval.tasks, or set eval.domains=true"
            raise ConfigError("eval.scores_interval", self.scores_interval, problem, cure)
        if not self.tasks and self.limit is not None:
            raise ConfigError("eval.limit", self.limit, "there are no tasks to limit", "name eval.tasks, or remove it")

    @property
    def has_scores(self) -> bool:
        return bool(self.tasks) or self.domains

    def check_installed(self) -> None:
        """Refuses tasks where lm-evaluation-harness is not here."""
        if self.tasks and importlib.util.find_spec("lm_eval") is None:
            cure = "pip install 'dynmoe[eval]', or remove them"
            raise ConfigError("eval.tasks", self.tasks, "needs a package that is not here (lm_eval)", cure)

    def evaluates(self, step: int, steps: int) -> bool:
        """Whether the validation loss is due after optimizer step ``step`` of ``steps``."""
        return step == steps or (self.interval > 0 and step % self.interval == 0)

    def scores(self, step: int, steps: int) -> bool:
        """Whether tasks and domains are due after optimizer step ``step`` of ``steps``."""
        return self.has_scores and (step == steps or (self.scores_interval > 0 and step % self.scores_interval == 0))
