"""Scores of tasks and domains during training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dynmoe.config import Config
from dynmoe.data.corpus import Corpus, by_domain

if TYPE_CHECKING:  # created before heavy modules are loaded
    from dynmoe.train.engine import Engine
    from dynmoe.train.metrics import Row


class TrainingScores:
    """The scores of ``eval.tasks`` and ``eval.domains``; tasks are loaded and rehearsed at construction.

    Raises:
        UserError: a task cannot be loaded, or cannot be scored during training.
    """

    def __init__(self, config: Config, corpora: Sequence[Corpus]) -> None:
        self._corpora = corpora
        self._tasks = None
        if config.eval.tasks:
            from dynmoe.evaluate.harness import open_tasks, rehearse  # the harness is only needed for tasks

            self._tasks = open_tasks(config.eval.tasks, "eval.tasks", generation=False)
            rehearse(self._tasks, corpora[0].tokenizer, config.data.sequence_length, config.eval.limit)

    def row(
        self,
        engine: Engine,
        vocab_size: int,
        cache: Path,
        progress: Callable[[str], None],
        config: Config,
        sequences: Mapping[str, int],
    ) -> Row:
        """Scores the engine's model. Collective; task scores are returned on the first rank of each host only.

        Args:
            engine: engine between two steps.
            vocab_size: rows of the model's embedding.
            cache: directory of index files, shared by all ranks.
            progress: called after every forward pass, so that a long evaluation is not mistaken for a hang.
            config: of the run, with the fields that a resumed run keeps.
            sequences: number of sequences to read per domain.
        """
        from dynmoe.evaluate.domains import score_domains
        from dynmoe.evaluate.models import ModelInTraining
        from dynmoe.train.scores import scores_row

        model = ModelInTraining(engine, config, self._corpora[0].tokenizer, vocab_size)

        def report(done: int, of: int) -> None:
            progress(f"forward pass {done} of {of} of the evaluation after step {engine.step}")

        tasks = domains = {}
        if self._tasks is not None:
            from dynmoe.evaluate.harness import score_tasks

            tasks = score_tasks(model, self._tasks, report, limit=config.eval.limit, bootstrap=0).scores
        if config.eval.domains:
            domains = score_domains(model, by_domain(self._corpora), cache, report, sequences)
        return scores_row(tasks, domains)
