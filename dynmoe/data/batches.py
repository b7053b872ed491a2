"""Batches in a fixed order: a pure function of seed, data and sample index."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dynmoe.data.corpus import Corpus
from dynmoe.data.order import Samples, open_samples
from dynmoe.errors import UserError

_SEEDS = 2**32  # numpy's range of seeds
_VALIDATION_SEED = 0  # constant, so that runs with different seeds are compared on the same text


@dataclass(frozen=True)
class Batch:
    """Sequences of one forward pass, int64 [B, S]; the label of each token is the next token."""

    tokens_BS: Tensor
    labels_BS: Tensor

    def pinned(self) -> Batch:
        """Copies the batch to page-locked memory."""
        return Batch(self.tokens_BS.pin_memory(), self.labels_BS.pin_memory())

    def to(self, device: torch.device) -> Batch:
        """Copies the batch to a device, asynchronously from page-locked memory."""
        return Batch(self.tokens_BS.to(device, non_blocking=True), self.labels_BS.to(device, non_blocking=True))


class PretrainingData:
    """Training and validation samples of a blend of corpora.

    The training order consists of epochs. Each goes once over the data, in an order drawn from seed + epoch; with
    weights, an epoch ends before the first corpus would repeat. Sample indices count through all epochs, so a run that
    is extended, or resumed on other ranks, continues with the next sample. All ranks must request the same epochs
    together: rank 0 writes the index while the others wait.

    Args:
        corpora: checked corpora with the same tokenizer.
        weights: weights of the corpora in the blend; empty: in proportion to their size.
        seed: seed of the order.
        cache: directory for index files, shared by all ranks.
    """

    def __init__(
        self, corpora: list[Corpus], weights: list[float], sequence_length: int, seed: int, cache: Path
    ) -> None:
        self.corpora = corpora
        self.sequence_length = sequence_length
        self.seed = seed
        self.cache = cache
        self.tokenizer = corpora[0].tokenizer
        self.weights = [weight / sum(weights) for weight in weights] if len(corpora) > 1 and weights else None
        self._epochs: dict[int, Samples] = {}
        self._validation: Samples | None = None

    def _build(self, split: str, seed: int, size: int | None) -> Samples:
        splits = [corpus.splits[split] for corpus in self.corpora]
        return open_samples(
            splits, self.sequence_length, seed, self.cache, None if size is None else self.weights, size
        )

    @property
    def _weighted_epoch_size(self) -> int | None:
        if self.weights is None:
            return None
        samples = [corpus.sequences("train", self.sequence_length) for corpus in self.corpora]
        size = math.floor(min(count / weight for count, weight in zip(samples, self.weights, strict=True)))
        if size < 1:
            raise UserError("data.weights: an epoch of this blend holds no sequence; give small corpora less weight")
        return size

    def _build_epoch(self, number: int) -> Samples:
        return self._build("train", (self.seed + number) % _SEEDS, self._weighted_epoch_size)

    def prepare(self, first: int, count: int) -> None:
        """Builds the epochs of samples ``first`` to ``first + count``. Collective: call it on every rank."""
        size = self.samples_per_epoch
        needed = range(first // size, (first + count - 1) // size + 1)
        self._epochs = {number: self._epochs.get(number) or self._build_epoch(number) for number in needed}

    @property
    def samples_per_epoch(self) -> int:
        """Number of samples in each epoch. Collective if no epoch was prepared yet."""
        if not self._epochs:
            self._epochs[0] = self._build_epoch(0)
        return len(next(iter(self._epochs.values())))

    @property
    def validation_samples(self) -> int:
        if self._validation is None:
            self._validation = self._build("validation", _VALIDATION_SEED, None)
        return len(self._validation)

    def train_batch(self, samples: range) -> Batch:
        """Returns the training samples with these indices; their epochs must be prepared."""
        size = self.samples_per_epoch
        return _stack([self._epochs[number // size][number % size] for number in samples])

    def validation_batch(self, samples: range) -> Batch:
        """Returns the validation samples with these indices, each below :attr:`validation_samples`."""
        assert self._validation is not None, "validation_samples comes first"
        return _stack([self._validation[number] for number in samples])


def _stack(samples: list[NDArray[np.int64]]) -> Batch:
    tokens = torch.from_numpy(np.stack(samples))
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
