"""Checks of Megatron's .bin/.idx pairs, whose content ``IndexedDataset`` trusts without checks.

Layout of .idx: magic, version (u64), token type code (u8), sequence and document counts (u64 each), then sequence
lengths (i32), byte pointers of the sequences (i64) and sequence indices at which documents start (i64). The .bin file
contains only the tokens.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynmoe.data import PREPARE_AGAIN
from dynmoe.errors import UserError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
# Megatron's codes for the integer types of token ids.
_TOKEN_TYPES: dict[int, np.dtype[Any]] = {
    1: np.dtype("uint8"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    8: np.dtype("<u2"),
}
_TOKENS_PER_SCAN = 1 << 22
_SEQUENCES_AT_A_TIME = 1 << 20


@dataclass(frozen=True)
class IndexedTokens:
    """A checked .bin/.idx pair.

    Attributes:
        prefix: path of both files without their endings.
        dtype: type of a token.
        lengths: number of tokens of each sequence.
        pointers: byte at which each sequence starts.
        boundaries: the first sequence of each document, plus the end.
    """

    prefix: Path
    dtype: np.dtype[Any]
    lengths: NDArray[np.int32]
    pointers: NDArray[np.int64]
    boundaries: NDArray[np.int64]

    @property
    def num_documents(self) -> int:
        return len(self.boundaries) - 1

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum(dtype=np.int64))

    @cached_property
    def _tokens(self) -> NDArray[Any]:
        """All tokens, memory-mapped."""
        path = with_ending(self.prefix, ".bin")
        return np.memmap(path, dtype=self.dtype, mode="r") if self.num_tokens else np.empty(0, self.dtype)

    def read(self, sequence: int, start: int, end: int | None) -> NDArray[np.int64]:
        """Tokens ``start`` to ``end`` of a sequence; None: to its end."""
        first = int(self.pointers[sequence]) // self.dtype.itemsize
        last = int(self.lengths[sequence]) if end is None else end
        return self._tokens[first + start : first + last].astype(np.int64)

    def span(self, first: int, end: int) -> NDArray[np.int64]:
        """Tokens ``first`` to ``end`` of all, whatever their sequences."""
        return self._tokens[first:end].astype(np.int64)

    def document_spans(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Place of the first token of each document, and its number of tokens."""
        ends = np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])[self.boundaries]
        return ends[:-1], np.diff(ends)

    def last_tokens(self, count: int) -> Iterator[int]:
        """Yields the last token of up to ``count`` documents, which are spread over all; empty ones have none."""
        step = max(1, -(-self.num_documents // count))
        for first, end in zip(self.boundaries[:-1:step].tolist(), self.boundaries[1::step].tolist(), strict=True):
            if end > first and (length := int(self.lengths[end - 1])):
                yield int(self.read(end - 1, length - 1, None)[0])

    def documents(self) -> Iterator[list[int]]:
        """Yields the tokens of each document."""
        tokens = self._tokens
        end = 0
        for first, last in zip(self.boundaries[:-1], self.boundaries[1:], strict=True):
            start = end
            end = end + int(self.lengths[first:last].sum(dtype=np.int64))
            yield tokens[start:end].tolist()

    def counts(self, vocab_size: int) -> NDArray[np.int64]:
        """Counts the occurrences of each token id, [vocab_size].

        Raises:
            UserError: an id is outside the vocabulary; names file and position.
        """
        path = with_ending(self.prefix, ".bin")
        tokens = self._tokens
        total = np.zeros(vocab_size, dtype=np.int64)
        for start in range(0, len(tokens), _TOKENS_PER_SCAN):
            block = np.asarray(tokens[start : start + _TOKENS_PER_SCAN]).astype(np.int64)
            outside = np.flatnonzero((block < 0) | (block >= vocab_size))
            if len(outside):
                token = int(block[outside[0]])
                place = start + int(outside[0])
                raise _damaged(path, f"token {token} at position {place} is outside the vocabulary of {vocab_size}")
            total += np.bincount(block, minlength=vocab_size)
        return total


def with_ending(prefix: Path, ending: str) -> Path:
    """Appends ``ending`` to the name, which may contain dots itself."""
    return prefix.with_name(prefix.name + ending)


def _damaged(path: Path, problem: str) -> UserError:
    return UserError(f"{path}: {problem}; {PREPARE_AGAIN}")


def token_type(vocab_size: int) -> np.dtype[Any]:
    """Integer type that Megatron's own tool uses for token ids of this vocabulary."""
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


def write_index(
    prefix: Path, dtype: np.dtype[Any], lengths: NDArray[np.int32], boundaries: NDArray[np.int64] | None = None
) -> None:
    """Writes ``prefix``.idx for sequences of ``lengths`` tokens, byte for byte like Megatron's builder.

    ``boundaries``: the sequences at which documents start, plus the end; None: each sequence is a document.
    ``lengths`` may be memory-mapped: it is read in blocks.
    """
    code = next(code for code, known in _TOKEN_TYPES.items() if known == dtype)
    count = len(lengths)
    with with_ending(prefix, ".idx").open("wb") as stream:
        stream.write(_HEADER.pack(_MAGIC, 1, code, count, count + 1 if boundaries is None else len(boundaries)))
        for block, _ in _blocks(lengths):
            stream.write(block.astype("<i4").tobytes())
        for block, first in _blocks(lengths):
            ends = block.cumsum(dtype=np.int64)
            stream.write(((first + ends - block) * dtype.itemsize).astype("<i8").tobytes())
        if boundaries is not None:
            stream.write(boundaries.astype("<i8").tobytes())
            return
        for start in range(0, count + 1, _SEQUENCES_AT_A_TIME):
            stream.write(np.arange(start, min(start + _SEQUENCES_AT_A_TIME, count + 1), dtype="<i8").tobytes())


def _blocks(lengths: NDArray[np.int32]) -> Iterator[tuple[NDArray[np.int32], int]]:
    """Yields blocks of ``lengths``, each with the number of tokens before it."""
    tokens = 0
    for start in range(0, len(lengths), _SEQUENCES_AT_A_TIME):
        block = lengths[start : start + _SEQUENCES_AT_A_TIME]
        yield block, tokens
        tokens += int(block.sum(dtype=np.int64))


def check_indexed(prefix: Path) -> IndexedTokens:
    """Checks magic, version, sizes, pointers and document boundaries of ``prefix``.bin and .idx; reads no tokens.

    The index may have billions of sequences. It is read in blocks and stays memory-mapped.

    Raises:
        UserError: names the file and its problem.
    """
    idx = with_ending(prefix, ".idx")
    bin_ = with_ending(prefix, ".bin")
    try:
        bin_size = bin_.stat().st_size
        idx_size = idx.stat().st_size
        content = np.memmap(idx, np.uint8, "r") if idx_size else np.empty(0, np.uint8)
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}; prepare the corpus with python -m data_prep") from None
    if idx_size < _HEADER.size:
        raise _damaged(idx, f"has {idx_size} bytes, less than its header")
    magic, version, code, num_sequences, num_boundaries = _HEADER.unpack(content[: _HEADER.size].tobytes())
    if magic != _MAGIC or version != 1:
        raise _damaged(idx, "is not a Megatron index of version 1")
    if code not in _TOKEN_TYPES:
        raise _damaged(idx, f"has the unknown token type code {code}")
    expected = _HEADER.size + num_sequences * (4 + 8) + num_boundaries * 8
    if idx_size != expected:
        raise _damaged(idx, f"has {idx_size} bytes, but its counts require {expected}")
    dtype = _TOKEN_TYPES[code]
    lengths = np.frombuffer(content, "<i4", num_sequences, _HEADER.size)
    pointers = np.frombuffer(content, "<i8", num_sequences, _HEADER.size + 4 * num_sequences)
    boundaries = np.frombuffer(content, "<i8", num_boundaries, _HEADER.size + 12 * num_sequences)
    wanted = 0
    for number, (block, first) in enumerate(_blocks(lengths)):
        if (block < 0).any():
            raise _damaged(idx, "has a sequence of negative length")
        ends = block.cumsum(dtype=np.int64)
        start = number * _SEQUENCES_AT_A_TIME
        if not np.array_equal(pointers[start : start + len(block)], (first + ends - block) * dtype.itemsize):
            raise _damaged(idx, "has pointers that do not match its sequence lengths")
        wanted = (first + int(ends[-1])) * dtype.itemsize
    if num_boundaries < 1 or boundaries[0] != 0 or boundaries[-1] != num_sequences or not _rises(boundaries):
        raise _damaged(idx, "has document boundaries that are not in order")
    if bin_size != wanted:
        raise _damaged(bin_, f"has {bin_size} bytes, but its index requires {wanted}")
    return IndexedTokens(prefix, dtype, lengths, pointers, boundaries)


def _rises(numbers: NDArray[np.int64]) -> bool:
    """Whether no number is smaller than the previous one."""
    starts = range(0, len(numbers), _SEQUENCES_AT_A_TIME)
    return all((np.diff(numbers[start : start + _SEQUENCES_AT_A_TIME + 1]) >= 0).all() for start in starts)
