"""Batches in a fixed order: a function of the seed, the data and the sample's number, and of nothing else."""

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

_SEEDS = 2**32  # what numpy takes
_VALIDATION_SEED = 0  # runs of any seed are compared on the same text


@dataclass(frozen=True)
class Batch:
    """Sequences of one forward pass: int64 [B, S]; the label of a token is the one that follows it."""

    tokens_BS: Tensor
    labels_BS: Tensor

    def pinned(self) -> Batch:
        """In page-locked memory."""
        return Batch(self.tokens_BS.pin_memory(), self.labels_BS.pin_memory())

    def to(self, device: torch.device) -> Batch:
        """On a device; from page-locked memory nobody waits for the copy."""
        return Batch(self.tokens_BS.to(device, non_blocking=True), self.labels_BS.to(device, non_blocking=True))


class PretrainingData:
    """Training and validation samples of a blend.

    The order is made of passes: each goes once over the data (a weighted blend ends where the first corpus would
    repeat itself) in an order drawn from seed + pass. Sample numbers count through all passes, so that a run that is
    made longer, or resumed on other ranks, goes on exactly where it was. All ranks must ask for the same samples'
    passes together: Megatron's builder writes its index on rank 0 and makes the others wait.

    Args:
        corpora: checked corpora with one tokenizer.
        weights: shares of the blend; empty for shares in proportion to size.
        sequence_length: tokens of a sample.
        seed: of the order.
        cache: directory for index files; shared by all ranks.
    """

    def __init__(
        self, corpora: list[Corpus], weights: list[float], sequence_length: int, seed: int, cache: Path
    ) -> None:
        self.corpora, self.sequence_length, self.seed, self.cache = corpora, sequence_length, seed, cache
        self.tokenizer = corpora[0].tokenizer
        self.weights = [weight / sum(weights) for weight in weights] if len(corpora) > 1 and weights else None
        self._passes: dict[int, Any] = {}
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
    def _size_of_weighted_pass(self) -> int | None:
        if self.weights is None:
            return None
        samples = [corpus.sequences("train", self.sequence_length) for corpus in self.corpora]
        size = math.floor(min(count / weight for count, weight in zip(samples, self.weights, strict=True)))
        if size < 1:
            raise UserError("data.weights: a pass over this blend holds no sequence; give small corpora less weight")
        return size

    def _build_pass(self, number: int) -> Any:
        return self._build("train", (self.seed + number) % _SEEDS, self._size_of_weighted_pass)

    def prepare(self, first: int, count: int) -> None:
        """Builds the passes that samples ``first`` to ``first + count`` lie in. Collective: call it on every rank."""
        size = self.samples_per_pass
        needed = range(first // size, (first + count - 1) // size + 1)
        self._passes = {number: self._passes.get(number) or self._build_pass(number) for number in needed}

    @property
    def samples_per_pass(self) -> int:
        """Samples of one pass, the same for all. Collective where no pass was prepared yet."""
        if not self._passes:
            self._passes[0] = self._build_pass(0)
        return len(next(iter(self._passes.values())))

    @property
    def validation_samples(self) -> int:
        if self._validation is None:
            self._validation = self._build("validation", _VALIDATION_SEED, None)
        return len(self._validation)

    def train_batch(self, samples: range) -> Batch:
        """The training samples of these numbers (passes must be prepared)."""
        size = self.samples_per_pass
        return _stack([self._passes[number // size][number % size] for number in samples])

    def validation_batch(self, samples: range) -> Batch:
        """The validation samples of these numbers, each below :attr:`validation_samples`."""
        return _stack([self._validation[number] for number in samples])


def _stack(samples: list[dict[str, Tensor]]) -> Batch:
    tokens = torch.stack([sample["tokens"] for sample in samples])
    return Batch(tokens, torch.stack([sample["labels"] for sample in samples]))
