"""Batches in a fixed order: a pure function of seed, data and sample index."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dynmoe.config import DataConfig
from dynmoe.config.constants import IGNORED
from dynmoe.data.corpus import Corpus
from dynmoe.data.order import Sample, Samples, open_samples
from dynmoe.data.packing import open_packed
from dynmoe.errors import UserError

_SEEDS = 2**32  # numpy's range of seeds
_VALIDATION_SEED = 0  # constant, so that runs with different seeds are compared on the same text


@dataclass(frozen=True)
class Batch:
    """Sequences of one forward pass, int64 [B, S].

    Attributes:
        tokens_BS: the tokens.
        labels_BS: the next token of each, or ``IGNORED``.
        start_BS: place in the sequence at which each token's document starts; None if documents are joined.
        ahead: the batch moved by 1, 2, ... tokens (:meth:`looking_ahead`).
    """

    tokens_BS: Tensor
    labels_BS: Tensor
    start_BS: Tensor | None = None
    ahead: tuple[Batch, ...] = ()

    def looking_ahead(self, depths: int) -> Batch:
        """The batch with itself moved by 1 to ``depths`` tokens: each position has a later token and its label.

        Where the sequence ends before that token, or it belongs to another document, there is token 0 with the label
        ``IGNORED``.
        """
        return replace(self, ahead=tuple(self._moved(depth) for depth in range(1, depths + 1)))

    def _moved(self, depth: int) -> Batch:
        rest = self.tokens_BS.shape[1] - depth
        inside_BS = torch.ones_like(self.tokens_BS, dtype=torch.bool)
        inside_BS[:, rest:] = False
        if self.start_BS is not None:
            inside_BS[:, :rest] = self.start_BS[:, depth:] == self.start_BS[:, :rest]
        tokens_BS = self.tokens_BS.roll(-depth, dims=1).where(inside_BS, 0)
        labels_BS = self.labels_BS.roll(-depth, dims=1).where(inside_BS, IGNORED)
        return Batch(tokens_BS, labels_BS)

    def pinned(self) -> Batch:
        """Copies the batch to page-locked memory."""
        return self._map(Tensor.pin_memory)

    def to(self, device: torch.device) -> Batch:
        """Copies the batch to a device, asynchronously from page-locked memory."""
        return self._map(lambda tensor_BS: tensor_BS.to(device, non_blocking=True))

    def at(self, positions_P: Tensor) -> Batch:
        """The batch at some positions of its sequences; ``start_BS`` remains that of all positions."""
        ahead = tuple(batch.at(positions_P) for batch in self.ahead)
        return Batch(self.tokens_BS[:, positions_P], self.labels_BS[:, positions_P], self.start_BS, ahead)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        start_BS = None if self.start_BS is None else change(self.start_BS)
        ahead = tuple(batch._map(change) for batch in self.ahead)
        return Batch(change(self.tokens_BS), change(self.labels_BS), start_BS, ahead)


class PretrainingData:
    """Training and validation samples of a blend of corpora.

    The training order consists of epochs. Each goes once over the data, in an order drawn from seed + epoch; with
    weights, an epoch ends before the first corpus would repeat. Sample indices count through all epochs, so a run that
    is extended, or resumed on other ranks, continues with the next sample. All ranks must request the same epochs
    together: rank 0 writes the index while the others wait.

    Args:
        corpora: checked corpora with the same tokenizer.
        settings: weights of the corpora, length of the sequences, and what their documents see. A run that is resumed
            settles them again before the first batch.
        seed: seed of the order.
        cache: directory for index files, shared by all ranks.
    """

    def __init__(self, corpora: list[Corpus], settings: DataConfig, seed: int, cache: Path) -> None:
        self.corpora = corpora
        self.seed = seed
        self.cache = cache
        self.tokenizer = corpora[0].tokenizer
        self.settle(settings)
        self._epochs: dict[int, Samples] = {}
        self._validation: Samples | None = None

    def settle(self, settings: DataConfig) -> None:
        """Replaces the settings.

        Raises:
            UserError: documents are to be masked, and those of a corpus do not end with the end-of-text token.
        """
        self.settings = settings
        if settings.documents == "masked":
            for corpus in self.corpora:
                corpus.check_ends()

    @property
    def weights(self) -> list[float] | None:
        """The share of each corpus; None if all of each is used."""
        weights = self.settings.weights
        return [weight / sum(weights) for weight in weights] if len(self.corpora) > 1 and weights else None

    def _build(self, split: str, seed: int, size: int | None) -> Samples:
        splits = [corpus.splits[split] for corpus in self.corpora]
        weights = None if size is None else self.weights
        open_part = open_packed if self.settings.packing == "best_fit" else None
        return open_samples(splits, self.settings.sequence_length, seed, self.cache, weights, size, open_part)

    @property
    def _weighted_epoch_size(self) -> int | None:
        if self.weights is None:
            return None
        samples = [corpus.sequences("train", self.settings.sequence_length) for corpus in self.corpora]
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
        eod = self.tokenizer.eod
        return self._stack([self._epochs[number // size].sequence(number % size, eod) for number in samples])

    def validation_batch(self, samples: range) -> Batch:
        """Returns the validation samples with these indices, each below :attr:`validation_samples`."""
        assert self._validation is not None, "validation_samples comes first"
        return self._stack([self._validation.sequence(number, self.tokenizer.eod) for number in samples])

    def _stack(self, samples: list[Sample]) -> Batch:
        tokens_BS, labels_BS, start_BS = (torch.from_numpy(np.stack(parts)) for parts in zip(*samples, strict=True))
        if not self.settings.predict_first_token:
            labels_BS[tokens_BS == self.tokenizer.eod] = IGNORED
        return Batch(tokens_BS, labels_BS, start_BS if self.settings.documents == "masked" else None)
