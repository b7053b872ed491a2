"""Scores of tasks and domains between the steps of a training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dynmoe.config import Config
from dynmoe.data.corpus import Corpus, by_domain

if TYPE_CHECKING:  # it is made before anything heavy is loaded
    from dynmoe.train.engine import Engine
    from dynmoe.train.metrics import Row


class TrainingScores:
    """What ``eval.tasks`` and ``eval.domains`` ask for; the tasks are read and rehearsed when it is made.

    Args:
        config: of the run.
        corpora: of ``data.dirs``.

    Raises:
        UserError: a task that cannot be read, or that cannot be scored while training.
    """

    def __init__(self, config: Config, corpora: Sequence[Corpus]) -> None:
        self._config, self._corpora = config, corpora
        self._tasks = None
        if config.eval.tasks:
            from dynmoe.evaluate.harness import open_tasks, rehearse  # only who wants tasks needs the harness

            self._tasks = open_tasks(config.eval.tasks, "eval.tasks", generation=False)
            rehearse(self._tasks, corpora[0].tokenizer, config.data.sequence_length, config.eval.limit)

    def row(
        self,
        engine: Engine,
        vocab_size: int,
        cache: Path,
        progress: Callable[[str], None],
        sequences: Mapping[str, int],
    ) -> Row:
        """Scores the engine's model; collective, and those of tasks are on the first rank of each host alone.

        Args:
            engine: between two steps.
            vocab_size: rows of the model's embedding.
            cache: directory of Megatron's index files, shared by all ranks.
            progress: is told of every pass, so that a long evaluation is not taken for a hang.
            sequences: how many of each domain are read.
        """
        from dynmoe.evaluate.domains import score_domains
        from dynmoe.evaluate.models import ModelInTraining
        from dynmoe.train.scores import scores_row

        model = ModelInTraining(engine, self._config, self._corpora[0].tokenizer, vocab_size)

        def tell(done: int, of: int) -> None:
            progress(f"pass {done} of {of} of the scores after step {engine.step}")

        tasks = domains = {}
        if self._tasks is not None:
            from dynmoe.evaluate.harness import score_tasks

            tasks = score_tasks(model, self._tasks, tell, limit=self._config.eval.limit, bootstrap=0).scores
        if self._config.eval.domains:
            domains = score_domains(model, by_domain(self._corpora), cache, tell, sequences)
        return scores_row(tasks, domains)
