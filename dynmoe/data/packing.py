"""Best-fit packing: whole documents in each sequence, instead of wherever concatenated text is cut (arXiv 2404.10830).

Documents longer than a sequence are cut into sequences and a rest. Rests and shorter documents are then packed, the
longest first, each into the fullest sequence that has room for it.

Shape suffixes: D documents, P pieces of documents, N sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dynmoe.config.constants import IGNORED
from dynmoe.data.indexed import IndexedTokens
from dynmoe.data.order import Arrays, Sample, cached


@dataclass(frozen=True)
class PackedSamples:
    """Packed sequences of a split, in random order.

    Attributes:
        tokens: the split.
        length: tokens of a sequence.
        first_P: place of each piece's first token in the split; the pieces of a sequence follow each other.
        size_P: tokens of each piece.
        begins_P: whether the piece is the beginning of its document.
        end_N: end of each sequence's pieces.
    """

    tokens: IndexedTokens
    length: int
    first_P: NDArray[np.int64]
    size_P: NDArray[np.int32]
    begins_P: NDArray[np.bool_]
    end_N: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.end_N)

    def sequence(self, index: int, eod: int) -> Sample:
        """The sequence at ``index``.

        A piece begins with the token before it; at the beginning of a document, with end-of-text, as a prompt does.
        What the pieces leave empty is end-of-text tokens that predict nothing, each a document of its own.
        """
        tokens_S = np.full(self.length, eod, dtype=np.int64)
        labels_S = np.full(self.length, IGNORED, dtype=np.int64)
        start_S = np.arange(self.length)
        place = 0
        for piece in range(int(self.end_N[index - 1]) if index else 0, int(self.end_N[index])):
            first = int(self.first_P[piece])
            end = place + int(self.size_P[piece])
            labels_S[place:end] = self.tokens.span(first, first + end - place)
            tokens_S[place + 1 : end] = labels_S[place : end - 1]
            tokens_S[place] = eod if self.begins_P[piece] else self.tokens.span(first - 1, first)[0]
            start_S[place:end] = place
            place = end
        return Sample(tokens_S, labels_S, start_S)


def open_packed(tokens: IndexedTokens, length: int, seed: int, cache: Path, samples: int | None) -> PackedSamples:
    """The packed sequences of one epoch, or of as many as give ``samples``. Collective, like ``open_samples``."""
    key = ("packed", str(tokens.prefix), tokens.num_tokens, length, seed, samples)
    names = ("first", "sizes", "begins", "ends")
    return PackedSamples(tokens, length, *cached(cache, key, names, lambda: _epochs(tokens, length, seed, samples)))


def _epochs(tokens: IndexedTokens, length: int, seed: int, samples: int | None) -> Arrays:
    """The arrays of :class:`PackedSamples`; each epoch is packed anew."""
    random = np.random.RandomState(seed)
    start_D, length_D = tokens.document_spans()
    parts = [_packed_documents(start_D, length_D, length, random)]
    while samples is not None and sum(len(end_N) for *_, end_N in parts) < samples:
        parts.append(_packed_documents(start_D, length_D, length, random))
    offset = np.cumsum([0, *(len(first_P) for first_P, *_ in parts)])
    end_N = np.concatenate([end_N + before for (*_, end_N), before in zip(parts, offset, strict=False)])
    first_P, size_P, begins_P = (np.concatenate(own) for own in zip(*(part[:3] for part in parts), strict=True))
    return first_P, size_P, begins_P, end_N[:samples]


def _packed_documents(
    start_D: NDArray[np.int64], length_D: NDArray[np.int64], length: int, random: np.random.RandomState
) -> Arrays:
    """The arrays of :class:`PackedSamples` for one epoch. Which pieces share a sequence is random too."""
    pieces_D = -(-length_D // length)
    document_P = np.repeat(np.arange(len(length_D)), pieces_D)
    offset_P = length * (np.arange(len(document_P)) - np.repeat(np.cumsum(pieces_D) - pieces_D, pieces_D))
    size_P = np.minimum(length_D[document_P] - offset_P, length).astype(np.int32)
    mixed_P = random.permutation(len(size_P))
    sequence_P = np.empty_like(mixed_P)
    sequence_P[mixed_P] = best_fit(size_P[mixed_P], length)
    count = int(sequence_P.max()) + 1
    sequence_P = random.permutation(count)[sequence_P]
    order_P = np.argsort(sequence_P, kind="stable")
    end_N = np.cumsum(np.bincount(sequence_P, minlength=count))
    first_P = start_D[document_P] + offset_P
    return first_P[order_P], size_P[order_P], offset_P[order_P] == 0, end_N


def best_fit(size_P: NDArray[np.int32], length: int) -> NDArray[np.int64]:
    """Packs pieces into sequences by best fit, the longest piece first; returns the sequence of each.

    Pieces of the same size are packed together: the fullest sequence with room takes as many as fit, because it stays
    the fullest with room. The work therefore grows with the number of sizes, not of pieces.

    Args:
        size_P: tokens of each piece, 1 to ``length``.
        length: tokens of a sequence.
    """
    sequence_P = np.empty(len(size_P), dtype=np.int64)
    sequences = _OpenSequences(length)
    longest_first_P = np.argsort(-size_P, kind="stable")
    ends = np.cumsum(np.bincount(length - size_P, minlength=length))  # of the pieces of each size
    for size, pieces in zip(range(length, 0, -1), np.split(longest_first_P, ends[:-1]), strict=True):
        packed = 0
        while packed < len(pieces):
            room, own = sequences.take_fullest(size, len(pieces) - packed)
            fits = room // size
            now = pieces[packed : packed + fits * len(own)]
            packed += len(now)
            filled = np.repeat(own, fits)[: len(now)]
            sequence_P[now] = filled
            whole, rest = divmod(len(now), fits)
            sequences.put(room - fits * size, own[:whole])
            sequences.put(room - rest * size, own[whole : whole + 1])
            sequences.put(room, own[whole + 1 :])
    return sequence_P


class _OpenSequences:
    """Sequences by the room that they have left; there are always enough empty ones."""

    def __init__(self, length: int) -> None:
        self._length = length
        self._count = 0
        self._by_room: list[list[NDArray[np.int64]]] = [[] for _ in range(length + 1)]
        self._is_there = np.zeros(length + 1, dtype=bool)

    def take_fullest(self, size: int, pieces: int) -> tuple[int, NDArray[np.int64]]:
        """Takes those with the least room for ``size`` tokens, or empty ones for all pieces; returns the room, too."""
        rooms = np.flatnonzero(self._is_there[size:])
        if not len(rooms):
            first = self._count
            self._count += -(-pieces // (self._length // size))
            return self._length, np.arange(first, self._count)
        room = size + int(rooms[0])
        own = np.concatenate(self._by_room[room])
        self._by_room[room] = []
        self._is_there[room] = False
        return room, own

    def put(self, room: int, sequences: NDArray[np.int64]) -> None:
        """Adds sequences that have this room left."""
        if room and len(sequences):
            self._by_room[room].append(sequences)
            self._is_there[room] = True
