"""Training batches one step ahead of the step that computes."""

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
    """Reads the batches of the next step on a thread while the present one computes.

    Which samples a step has follows from their numbers alone: a run that ends forgets what it has read ahead, and the
    one that goes on reads it again.

    Args:
        data: what is read.
        train: sizes of batches.
        rank, ranks: of data parallelism.
        pin: into memory from which a GPU copies while it computes.
    """

    def __init__(self, data: PretrainingData, train: TrainConfig, rank: int, ranks: int, pin: bool) -> None:
        self._data, self._train, self._rank, self._ranks, self._pin = data, train, rank, ranks, pin
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader")
        self._ahead: _Step | None = None

    def take(self, first: int, goes_on: bool) -> tuple[list[range], list[Batch]]:
        """Samples and batches of each micro-batch of the step that begins with sample ``first``.

        Waits until they are read, and begins to read the step after it where the run ``goes_on``. Collective, as
        :meth:`PretrainingData.prepare` is.

        Raises:
            Exception: whatever reading this step's samples raised.
        """
        step, self._ahead = self._ahead or self._begin(first), None
        assert step.first == first, "steps are taken in order"
        batches = step.batches.result()
        if goes_on:
            self._ahead = self._begin(first + self._train.global_batch)
        return step.samples, batches

    def close(self) -> None:
        """Ends the thread, after what it is reading."""
        self._thread.shutdown(cancel_futures=True)

    def _begin(self, first: int) -> _Step:
        """Called when nothing is being read: the data may change its passes, on this thread as ranks wait for it."""
        self._data.prepare(first, self._train.global_batch)
        samples = self._samples(first)
        return _Step(first, samples, self._thread.submit(self._read, samples))

    def _samples(self, first: int) -> list[range]:
        """Of each micro-batch of this rank: consecutive samples go round the ranks, then to the next pass."""
        size, end = self._train.micro_batch, first + self._train.global_batch
        return [range(start, start + size) for start in range(first + self._rank * size, end, self._ranks * size)]

    def _read(self, samples: list[range]) -> list[Batch]:
        batches = [self._data.train_batch(numbers) for numbers in samples]
        return [batch.pinned() for batch in batches] if self._pin else batches
