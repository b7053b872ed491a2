"""Reads training batches one step ahead."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from dynmoe.config.sections import TrainConfig
from dynmoe.data.batches import Batch, PretrainingData


@dataclass(frozen=True)
class _Step:
    first: int
    samples: list[range]
    batches: Future[list[Batch]]


class Loader:
    """Reads the batches of the next step on a thread while the current step runs.

    The samples of a step depend only on their indices. A run that ends discards the batches that it has read ahead, and
    the resumed run reads them again.

    Args:
        rank, ranks: data-parallel rank and number of ranks.
        pin: whether to copy batches to page-locked memory, for asynchronous copies to a GPU.
    """

    def __init__(self, data: PretrainingData, train: TrainConfig, rank: int, ranks: int, pin: bool) -> None:
        self._data = data
        self._train = train
        self._rank = rank
        self._ranks = ranks
        self._pin = pin
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader")
        self._ahead: _Step | None = None

    def take(self, first: int, continues: bool) -> tuple[list[range], list[Batch]]:
        """Returns the sample indices and batches of each micro-batch of the step that starts at sample ``first``.

        Waits until they are read, then starts to read the next step if the run ``continues``. Collective, like
        :meth:`PretrainingData.prepare`.

        Raises:
            Exception: any error while reading the samples of this step.
        """
        step = self._ahead or self._begin(first)
        self._ahead = None
        assert step.first == first, "steps must be taken in order"
        batches = step.batches.result()
        if continues:
            self._ahead = self._begin(first + self._train.global_batch)
        return step.samples, batches

    def close(self) -> None:
        """Ends the thread after its current read."""
        self._thread.shutdown(cancel_futures=True)

    def _begin(self, first: int) -> _Step:
        """Starts reading. Runs while no read is in progress, because ``prepare`` may replace epochs, collectively."""
        self._data.prepare(first, self._train.global_batch)
        samples = self._samples(first)
        return _Step(first, samples, self._thread.submit(self._read, samples))

    def _samples(self, first: int) -> list[range]:
        """Samples of each micro-batch of this rank: consecutive micro-batches go to consecutive ranks."""
        size = self._train.micro_batch
        end = first + self._train.global_batch
        return [range(start, start + size) for start in range(first + self._rank * size, end, self._ranks * size)]

    def _read(self, samples: list[range]) -> list[Batch]:
        batches = [self._data.train_batch(numbers) for numbers in samples]
        return [batch.pinned() for batch in batches] if self._pin else batches
