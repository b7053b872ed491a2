"""Checks of Megatron's .bin/.idx pairs: everything that ``IndexedDataset`` trusts blindly.

Layout of .idx: magic, version (u64), token type code (u8), sequence and document counts (u64 each), then sequence
lengths (i32), byte pointers of the sequences (i64) and sequence indices at which documents start (i64). The .bin file
is the tokens and nothing else.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynmoe.errors import UserError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
# Megatron's codes of the types that token ids come in.
_TOKEN_TYPES: dict[int, np.dtype[Any]] = {
    1: np.dtype("uint8"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    8: np.dtype("<u2"),
}
_TOKENS_PER_SCAN = 1 << 22


@dataclass(frozen=True)
class IndexedTokens:
    """A checked .bin/.idx pair."""

    prefix: Path
    dtype: np.dtype[Any]
    lengths: NDArray[np.int32]
    num_documents: int

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum(dtype=np.int64))

    def counts(self, vocab_size: int) -> NDArray[np.int64]:
        """Occurrences of each token id, [vocab_size].

        Raises:
            UserError: an id outside the vocabulary, naming file and position.
        """
        path = self.prefix.with_suffix(".bin")
        tokens = np.memmap(path, dtype=self.dtype, mode="r") if self.num_tokens else np.empty(0, self.dtype)
        total = np.zeros(vocab_size, dtype=np.int64)
        for start in range(0, len(tokens), _TOKENS_PER_SCAN):
            block = np.asarray(tokens[start : start + _TOKENS_PER_SCAN]).astype(np.int64)
            outside = np.flatnonzero((block < 0) | (block >= vocab_size))
            if len(outside):
                token, place = int(block[outside[0]]), start + int(outside[0])
                raise _damaged(path, f"token {token} at position {place} is outside the vocabulary of {vocab_size}")
            total += np.bincount(block, minlength=vocab_size)
        return total


def _damaged(path: Path, problem: str) -> UserError:
    return UserError(f"{path}: {problem}; prepare the corpus again")


def check_indexed(prefix: Path) -> IndexedTokens:
    """Checks magic, version, sizes, pointers and document boundaries of ``prefix``.bin and .idx; reads no token.

    Raises:
        UserError: naming the file and what is wrong with it.
    """
    idx, bin_ = prefix.with_suffix(".idx"), prefix.with_suffix(".bin")
    try:
        content, bin_size = idx.read_bytes(), bin_.stat().st_size
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}; prepare the corpus with python -m data_prep") from None
    if len(content) < _HEADER.size:
        raise _damaged(idx, f"has {len(content)} bytes, less than its header")
    magic, version, code, num_sequences, num_boundaries = _HEADER.unpack_from(content)
    if magic != _MAGIC or version != 1:
        raise _damaged(idx, "is not a Megatron index of version 1")
    if code not in _TOKEN_TYPES:
        raise _damaged(idx, f"has the unknown token type code {code}")
    expected = _HEADER.size + num_sequences * (4 + 8) + num_boundaries * 8
    if len(content) != expected:
        raise _damaged(idx, f"has {len(content)} bytes where its counts ask for {expected}")
    dtype = _TOKEN_TYPES[code]
    lengths = np.frombuffer(content, "<i4", num_sequences, _HEADER.size)
    pointers = np.frombuffer(content, "<i8", num_sequences, _HEADER.size + 4 * num_sequences)
    boundaries = np.frombuffer(content, "<i8", num_boundaries, _HEADER.size + 12 * num_sequences)
    if (lengths < 0).any():
        raise _damaged(idx, "has a sequence of negative length")
    ends = lengths.cumsum(dtype=np.int64) * dtype.itemsize
    if not np.array_equal(pointers, np.concatenate([[0], ends[:-1]]) if num_sequences else pointers[:0]):
        raise _damaged(idx, "has pointers that do not follow from its sequence lengths")
    if num_boundaries < 1 or boundaries[0] != 0 or boundaries[-1] != num_sequences or (np.diff(boundaries) < 0).any():
        raise _damaged(idx, "has document boundaries that are not in order")
    wanted = int(ends[-1]) if num_sequences else 0
    if bin_size != wanted:
        raise _damaged(bin_, f"has {bin_size} bytes where its index asks for {wanted}")
    return IndexedTokens(prefix, dtype, lengths, num_boundaries - 1)
