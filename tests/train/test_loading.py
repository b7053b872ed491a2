"""The trainer closes the prefetching thread however a run ends."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from dynmoe.config import load_config
from dynmoe.data.batches import Batch, PretrainingData
from dynmoe.data.corpus import open_corpora
from dynmoe.errors import UserError
from tests.train.cases import tiny


class RecordingData(PretrainingData):
    """Records the names of reading threads; samples from ``damaged`` on are corrupt."""

    def __init__(self, *arguments: Any, damaged: int) -> None:
        super().__init__(*arguments)
        self.readers: set[str] = set()
        self._damaged = damaged

    def train_batch(self, samples: range) -> Batch:
        self.readers.add(threading.current_thread().name)
        if samples.stop > self._damaged:
            raise UserError("the data is damaged")
        return super().train_batch(samples)


def run(corpus: Path, runs: Path, way: str) -> tuple[str, int, list[str], list[str]]:
    """Runs four steps; returns how the run ended, after which step, the reading threads and the remaining threads."""
    from dynmoe.engines import make_engine
    from dynmoe.train.run_directory import RunDirectory
    from dynmoe.train.trainer import Trainer
    from dynmoe.train.watchdog import Watchdog

    fields = ["parallel.expert=1", "train.steps=4", "eval.interval=0", "adaptation.interval=0"]
    config = load_config(None, [*tiny(corpus, runs), *fields])
    directory = RunDirectory(config.run.path)
    corpora = open_corpora(config.data.dirs, config.data.sequence_length)
    directory.claim()
    damaged = 2 * config.train.global_batch if way == "failed" else 10**9
    data = RecordingData(corpora, config.data, 0, directory.data_index, damaged=damaged)
    rows = config.model.embedding_rows(corpora[0].tokenizer.vocab_size)
    engine = make_engine(config, rows)
    stop_signal = SimpleNamespace(requested=False, has_state_to_save=lambda: None)

    def update(lr: float, take: Any = engine.update) -> Any:
        stop_signal.requested = way == "preempted" and engine.step == 2
        return take(lr)

    engine.update = update
    watchdog = Watchdog(directory.hangs, 0.0)
    trainer = Trainer(config, engine, data, directory, rows, lambda *_: ([], None), stop_signal, watchdog, dict)
    try:
        ended = trainer.run().status
    except UserError as error:
        ended = str(error)
    directory.release()
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith("loader")]
    return ended, trainer.progress.step, sorted(data.readers), left


def run_each_way(corpus: str, root: str) -> list[tuple[str, int, list[str], list[str]]]:
    return [run(Path(corpus), Path(root) / way, way) for way in ("finished", "preempted", "failed")]


def test_loader_is_closed_however_a_run_ends(one_rank, corpus_dir, tmp_path):
    (found,) = one_rank.run(run_each_way, str(corpus_dir), str(tmp_path))
    reader = (["loader_0"], [])  # only this thread reads, and it is gone
    assert found == [("finished", 4, *reader), ("preempted", 2, *reader), ("the data is damaged", 2, *reader)]
