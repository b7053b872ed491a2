"""The order of training samples: that of Megatron-Core's ``GPTDataset``, whose import alone takes seconds.

Shape suffixes: M places in the shuffled text, N samples, C corpora.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray

from dynmoe.data.indexed import IndexedTokens
from dynmoe.errors import UserError

# Megatron's constants: samples that each corpus of a weighted blend has in reserve, and the share of an epoch below
# which its last epoch is shuffled on its own.
_SURPLUS = 0.005
_WHOLE_ENOUGH = 0.8

Arrays = tuple[NDArray[Any], ...]
# Opens the samples of a split, given length, seed, cache, and how many are needed (None: one epoch).
OpenPart = Callable[[IndexedTokens, int, int, Path, int | None], "Samples"]


class Sample(NamedTuple):
    """A sequence for training.

    Attributes:
        tokens_S: the tokens, int64.
        labels_S: the next token of each, or ``IGNORED``.
        start_S: place in the sequence at which each token's document starts, int64.
    """

    tokens_S: NDArray[np.int64]
    labels_S: NDArray[np.int64]
    start_S: NDArray[np.int64]


class Samples(Protocol):
    """Sequences of one length."""

    def __len__(self) -> int: ...

    def sequence(self, index: int, eod: int) -> Sample:
        """The sequence at ``index``, given the end-of-text token."""


@dataclass(frozen=True)
class CorpusSamples:
    """A split of a corpus, its sequences in random order, cut into samples, which are shuffled again.

    Attributes:
        tokens: the split.
        sequence_M: the sequence at each place; all sequences, once in each epoch.
        starts_N2: place and offset of each sample's first token, and of the last sample's last token.
        sample_N: the sample at each index. Its last token is the first one of the next sample.
    """

    tokens: IndexedTokens
    sequence_M: NDArray[Any]
    starts_N2: NDArray[Any]
    sample_N: NDArray[Any]

    def __len__(self) -> int:
        return len(self.sample_N)

    def sequence(self, index: int, eod: int) -> Sample:
        """The sequence at ``index``. A document begins with the end-of-text token before it, as a prompt does."""
        window = self.window(index)
        start_S = np.maximum.accumulate(np.where(window[:-1] == eod, np.arange(len(window) - 1), 0))
        return Sample(window[:-1], window[1:], start_S)

    def window(self, index: int) -> NDArray[np.int64]:
        """The tokens of the sequence at ``index`` and the one after them."""
        sample = int(self.sample_N[index])
        (first, offset), (last, end) = self.starts_N2[sample : sample + 2].tolist()
        sequences = self.sequence_M[first : last + 1].tolist()
        starts = [offset] + [0] * (last - first)
        ends = [None] * (last - first) + [end + 1]
        return np.concatenate([self.tokens.read(*part) for part in zip(sequences, starts, ends, strict=True)])


@dataclass(frozen=True)
class BlendedSamples:
    """Samples of several corpora, mixed evenly.

    Attributes:
        parts: the corpora.
        source_N: the corpus of each sample.
        sample_N: index of each sample in its corpus.
    """

    parts: Sequence[Samples]
    source_N: NDArray[Any]
    sample_N: NDArray[Any]

    def __len__(self) -> int:
        return len(self.source_N)

    def sequence(self, index: int, eod: int) -> Sample:
        """The sequence at ``index``, given the end-of-text token."""
        return self.parts[self.source_N[index]].sequence(int(self.sample_N[index]), eod)


def open_samples(
    splits: Sequence[IndexedTokens], length: int, seed: int, cache: Path, weights: Sequence[float] | None = None,
    size: int | None = None, open_part: OpenPart | None = None,
) -> Samples:  # fmt: skip
    """One epoch of samples of ``length`` tokens each. Collective: rank 0 writes the index, all ranks map it.

    Args:
        splits: the same split of each corpus of a blend.
        seed: seed of the order.
        cache: directory for index files, shared by all ranks.
        weights: share of each corpus; None: all samples of each.
        size: number of samples with weights.
        open_part: opens the samples of one corpus; None: its concatenated text, cut.

    Raises:
        UserError: an index file is damaged.
    """
    open_part = open_part or open_windows
    if weights is None or size is None:
        parts = [open_part(tokens, length, seed, cache, None) for tokens in splits]
        if len(parts) == 1:
            return parts[0]
        share_C = None
        counts = [len(part) for part in parts]
    else:
        share_C = _normalized(weights)
        counts = [math.ceil(size * share) for share in share_C.tolist()]
        # The mix takes a sample of the corpus that is furthest behind, so never more than one above its share. With
        # many corpora that may be more than Megatron's surplus, and its own blend would end with an IndexError.
        most = [1 + math.ceil(share * (sum(counts) - 1)) for share in share_C.tolist()]
        reserve = [max(math.ceil(count * (1 + _SURPLUS)), own) for count, own in zip(counts, most, strict=True)]
        parts = [open_part(tokens, length, seed, cache, number) for tokens, number in zip(splits, reserve, strict=True)]
    facts = [(str(tokens.prefix), len(part)) for tokens, part in zip(splits, parts, strict=True)]
    key = ("blend", facts, length, seed, None if share_C is None else share_C.tolist(), counts)
    return BlendedSamples(parts, *cached(cache, key, ("source", "sample"), lambda: _mixed(counts, share_C)))


def open_windows(tokens: IndexedTokens, length: int, seed: int, cache: Path, samples: int | None) -> CorpusSamples:
    """Concatenates the sequences of a split and cuts them; see :func:`shuffled`. Collective."""
    key = (str(tokens.prefix), tokens.num_tokens, length, seed, samples)
    names = ("sequences", "starts", "samples")
    return CorpusSamples(tokens, *cached(cache, key, names, lambda: shuffled(tokens.lengths, length, seed, samples)))


def cached(cache: Path, key: object, names: Sequence[str], build: Callable[[], Arrays]) -> Arrays:
    """The arrays of ``build``, mapped from files that rank 0 writes if one is missing. Collective."""
    stem = hashlib.sha256(repr(key).encode()).hexdigest()[:16]
    paths = [cache / f"{stem}-{name}.npy" for name in names]
    if (not dist.is_initialized() or dist.get_rank() == 0) and not all(path.exists() for path in paths):
        cache.mkdir(parents=True, exist_ok=True)
        for path, array in zip(paths, build(), strict=True):
            np.save(path, array)
    if dist.is_initialized():
        dist.barrier()
    return tuple(map(_mapped, paths))


def _mapped(path: Path) -> NDArray[Any]:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)  # a pickle can execute code
    except (ValueError, EOFError):
        raise UserError(f"{path}: is not an array of numbers; delete its directory, it will be rebuilt") from None


def shuffled(lengths: NDArray[np.int32], length: int, seed: int, samples: int | None = None) -> Arrays:
    """The arrays of :class:`CorpusSamples` for sequences of these lengths.

    Args:
        lengths: length of each sequence.
        length: tokens of a sample, besides the one that it shares with the next.
        seed: seed of the order.
        samples: number of samples that must be there, in as many epochs as that takes; None: those of one epoch.
    """
    per_epoch = int(lengths.sum(dtype=np.int64))
    epochs = 1 if samples is None else -(-(samples * length + 1) // per_epoch)
    in_one, before_last, count = ((number * per_epoch - 1) // length for number in (1, epochs - 1, epochs))
    apart = samples is not None and epochs > 1 and samples - before_last < int(_WHOLE_ENOUGH * in_one)
    random = np.random.RandomState(seed)
    every = np.arange(len(lengths), dtype=np.int32)
    sequence_M = _shuffle([np.tile(every, number) for number in ((epochs - 1, 1) if apart else (epochs,))], random)
    kind = np.uint32 if count < 2**32 else np.int64
    numbers_N = np.arange(count, dtype=kind)
    sample_N = _shuffle(np.split(numbers_N, [before_last] if apart else []), random)
    return sequence_M, _starts(lengths[sequence_M], length, count), sample_N


def _shuffle(parts: Sequence[NDArray[Any]], random: np.random.RandomState) -> NDArray[Any]:
    """Shuffles each part and joins them."""
    for part in parts:
        random.shuffle(part)
    return np.concatenate(parts)


def _starts(length_M: NDArray[np.int32], length: int, count: int) -> NDArray[Any]:
    """Place and offset of the first tokens of ``count`` samples, and of the last token of the last one."""
    end_M = length_M.cumsum(dtype=np.int64)
    first_N = np.arange(count + 1) * length
    place_N = np.searchsorted(end_M, first_N, side="right")
    starts_N2 = np.stack([place_N, first_N - (end_M[place_N] - length_M[place_N])], axis=1)
    return starts_N2.astype(np.int32 if len(length_M) < 2**31 else np.int64)


def _normalized(weights: Sequence[float]) -> NDArray[np.float64]:
    share_C = np.array(weights, dtype=np.float64)
    return share_C / share_C.sum()


def _mixed(counts: Sequence[int], share_C: NDArray[np.float64] | None) -> Arrays:
    """Source and sample of each place of a blend: always of the corpus that is furthest behind its share."""
    # Only here: its import takes seconds, which a single corpus does not need.
    from dynmoe.data.megatron import helpers

    size = sum(counts)
    source_N = np.zeros(size, dtype=np.int16)
    sample_N = np.zeros(size, dtype=np.int64)
    if share_C is None:
        helpers.build_exhaustive_blending_indices(source_N, sample_N, np.array(counts, dtype=np.int64), len(counts))
    else:
        share_C = share_C / share_C.sum()  # again, as Megatron does: the last bit decides ties
        helpers.build_blending_indices(source_N, sample_N, share_C, len(counts), size, False)
    return source_N, sample_N
