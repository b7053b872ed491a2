"""Checks files in pieces: in any process, on multiple threads, with progress in bytes.

The SHA-256 of a whole file is one sequential computation. Files larger than a block therefore also have a hash per
block, so that many processes can share one file.
"""

from __future__ import annotations

import hashlib
import heapq
import os
import socket
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dynmoe.errors import first_line

BLOCK_BYTES = 1 << 28
_READ_AT_A_TIME = 1 << 22
_THREADS = 8


class DamageError(Exception):
    """A file is damaged; the text has its name and the problem."""


class UnreadableError(OSError):
    """A file cannot be read here and now, which says nothing about its content; the text has its name and the cause."""

    @classmethod
    def of(cls, name: str, error: Exception) -> UnreadableError:
        cause = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
        return cls(f"{name} cannot be read on {socket.gethostname()} ({cause})")


# Errors of a path that is not that of a file, whoever reads it.
NO_SUCH_FILE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


@dataclass(frozen=True)
class TokenIds:
    """Describes a file of token ids: ``dtype``, and that each id is at least 0 and below ``vocab_size``."""

    dtype: np.dtype[Any]
    vocab_size: int


@dataclass(frozen=True)
class Piece:
    """A file or a part of it, with its expected content.

    Attributes:
        name: name of the file in messages.
        start: first byte of the piece.
        size: bytes of the piece.
        file_size: bytes of the whole file.
        sha256: hash of the piece.
        ids: set if the file contains token ids.
    """

    path: Path
    name: str
    start: int
    size: int
    file_size: int
    sha256: str
    ids: TokenIds | None = None

    def check(self) -> Iterator[int]:
        """Reads the piece once; yields the number of bytes after each read.

        Raises:
            DamageError: the file is missing or differs from the expected content.
            UnreadableError: it cannot be read.
        """
        digest = hashlib.sha256()
        outside = None
        place = self.start
        try:
            with self.path.open("rb", buffering=0) as stream:
                if (size := os.fstat(stream.fileno()).st_size) != self.file_size:
                    raise DamageError(f"{self.name} is damaged: it has {size} bytes instead of {self.file_size}")
                stream.seek(self.start)
                buffer = memoryview(bytearray(min(_READ_AT_A_TIME, self.size)))
                while left := self.start + self.size - place:
                    block = buffer[: _fill(stream, buffer[:left])]
                    if not block:
                        raise DamageError(f"{self.name}: it was truncated while it was read")
                    digest.update(block)
                    if outside is None and self.ids is not None:
                        outside = _outside(block, self.ids, place)
                    place += len(block)
                    yield len(block)
        except NO_SUCH_FILE:
            raise DamageError(f"{self.name} is missing") from None
        except OSError as error:
            raise UnreadableError.of(self.name, error) from None
        if digest.hexdigest() != self.sha256:
            where = "" if self.size == self.file_size else f" from byte {self.start} to {self.start + self.size}"
            raise DamageError(f"{self.name} is damaged: its SHA-256{where} is not the manifest's")
        if outside is not None:
            raise DamageError(f"{self.name}: {outside}")


def _fill(stream: Any, buffer: memoryview) -> int:
    """Reads until ``buffer`` is full, so that no token is split; returns its length, 0 if the file ends before."""
    read = 0
    while read < len(buffer):
        count = stream.readinto(buffer[read:])
        if not count:
            return 0
        read += count
    return read


def _outside(block: memoryview, ids: TokenIds, place: int) -> str | None:
    """Reports the first id outside the vocabulary in ``block``, which starts at byte ``place`` of its file."""
    tokens = np.frombuffer(block, ids.dtype)
    if tokens.max() < ids.vocab_size and (ids.dtype.kind == "u" or tokens.min() >= 0):
        return None
    first = int(np.flatnonzero((tokens < 0) | (tokens >= ids.vocab_size))[0])
    position = place // ids.dtype.itemsize + first
    return f"token {tokens[first]} at position {position} is outside the vocabulary of {ids.vocab_size}"


class Checking:
    """Checks pieces in order on threads of this process.

    Attributes:
        total: bytes of all pieces.
    """

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self._pieces = pieces
        self.total = sum(piece.size for piece in pieces)
        self._read = [0] * len(pieces)
        self._problems: dict[int, Exception] = {}
        self._stopped = False
        pool = ThreadPoolExecutor(_threads(), "checking")
        self._futures = [pool.submit(self._check, number) for number in range(len(pieces))]
        pool.shutdown(wait=False)  # its threads end after the last piece

    def _check(self, number: int) -> None:
        """Checks one piece unless an earlier one is damaged: only the first problem is reported."""
        try:
            for count in self._pieces[number].check():
                self._read[number] += count
                if self._stopped or any(damaged < number for damaged in tuple(self._problems)):
                    return
        except (DamageError, UnreadableError) as problem:
            self._problems[number] = problem
        except Exception as error:
            self._problems[number] = UnreadableError.of(self._pieces[number].name, error)

    def wait(self, seconds: float | None = None) -> bool:
        """Waits up to ``seconds``; returns whether all checks are complete."""
        return not wait(self._futures, seconds).not_done

    def stop(self) -> None:
        """Stops the threads after their current read."""
        self._stopped = True

    @property
    def done(self) -> int:
        """Number of bytes read so far."""
        return sum(self._read)

    @property
    def problem(self) -> Exception | None:
        """Problem of the first damaged or unreadable piece found so far."""
        return self._problems[min(self._problems)] if self._problems else None

    @property
    def place(self) -> str:
        """Name of the file that is currently read."""
        reading = (p.name for p, read in zip(self._pieces, self._read, strict=True) if read < p.size)
        return next(reading, "nothing")


def _threads() -> int:
    """Number of threads: this rank's share of the host's cores."""
    cores = len(os.sched_getaffinity(0))
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(_THREADS, cores // ranks))


def first_problem(pieces: Sequence[Piece]) -> str | None:
    """Returns the problem of the first damaged piece; None if all are intact.

    Raises:
        UnreadableError: a piece before it cannot be read.
    """
    checking = Checking(pieces)
    try:
        checking.wait()
    finally:
        checking.stop()
    return damage_of(checking.problem)


def damage_of(problem: Exception | None) -> str | None:
    """The text of a problem that is damage; None if there is no problem.

    Raises:
        UnreadableError: it is none.
    """
    if isinstance(problem, UnreadableError):
        raise problem
    return None if problem is None else str(problem)


def assign(sizes: Sequence[int], ranks: int) -> list[list[int]]:
    """Assigns pieces to ranks: the largest first, each to the rank with the fewest bytes.

    No rank gets more than the mean plus one piece.

    Args:
        sizes: bytes of each piece.
    """
    shares: list[list[int]] = [[] for _ in range(ranks)]
    load = [(0, rank) for rank in range(ranks)]
    for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        size, rank = heapq.heappop(load)
        shares[rank].append(number)
        heapq.heappush(load, (size + sizes[number], rank))
    return [sorted(share) for share in shares]


def hash_blocks(path: Path, block_bytes: int) -> tuple[str, list[str]]:
    """Returns the SHA-256 of a whole file and of each of its blocks, reading the file once."""
    whole = hashlib.sha256()
    blocks = list[str]()
    with path.open("rb") as stream:
        digest = hashlib.sha256()
        left = block_bytes
        while content := stream.read(min(_READ_AT_A_TIME, left)):
            whole.update(content)
            digest.update(content)
            left -= len(content)
            if not left:
                blocks.append(digest.hexdigest())
                digest = hashlib.sha256()
                left = block_bytes
    return whole.hexdigest(), blocks if left == block_bytes else [*blocks, digest.hexdigest()]
