"""Batches in a fixed order: a pure function of seed, data and sample index."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dynmoe.data.corpus import Corpus
from dynmoe.data.megatron import BlendedMegatronDatasetBuilder, GPTDataset, GPTDatasetConfig
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
    together: Megatron's builder writes its index on rank 0 while the others wait.

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
        self._epochs: dict[int, Any] = {}
        self._validation: Any = None

    def _build(self, split: str, seed: int, size: int | None) -> Any:
        prefixes = [str(corpus.path / split) for corpus in self.corpora]
        blend = (prefixes, self.weights if split == "train" else None)
        config = GPTDatasetConfig(
            random_seed=seed,
            sequence_length=self.sequence_length,
            blend_per_split=[blend if split == name else None for name in ("train", "validation", "test")],
            path_to_cache=str(self.cache),
            tokenizer=self.tokenizer,  # type: ignore[arg-type]
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        sizes = [size if split == name else 0 for name in ("train", "validation", "test")]
        built = BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()
        return built[0 if split == "train" else 1]

    @property
    def _weighted_epoch_size(self) -> int | None:
        if self.weights is None:
            return None
        samples = [corpus.sequences("train", self.sequence_length) for corpus in self.corpora]
        size = math.floor(min(count / weight for count, weight in zip(samples, self.weights, strict=True)))
        if size < 1:
            raise UserError("data.weights: an epoch of this blend holds no sequence; give small corpora less weight")
        return size

    def _build_epoch(self, number: int) -> Any:
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
        return _stack([self._validation[number] for number in samples])


def _stack(samples: list[dict[str, Tensor]]) -> Batch:
    tokens = torch.stack([sample["tokens"] for sample in samples])
    return Batch(tokens, torch.stack([sample["labels"] for sample in samples]))
