"""Encodes text to tokens, one unit at a time, in worker processes. Does not import torch, so that workers start
quickly.

Each unit becomes one file of arrays, written atomically. An interrupted build resumes with the missing files.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from data_prep.sources import BLANK, ContentHash, RefusedError, read_unit, text_of
from data_prep.units import Unit
from dynmoe.data.tokenizer import Tokenizer
from dynmoe.data.tokenizer_files import open_tokenizer
from dynmoe.errors import UserError, first_line
from dynmoe.launched import end_with_parent

Task = TypeVar("Task")
Done = TypeVar("Done")

_MAX_WORDS = 1_000_000
_LONGEST_WORD = 32


class WordEncoder:
    """Encodes text word by word and caches the tokens of each word, several times as fast as whole texts.

    The tokens are identical to those of the whole text, for tokenizers that say so: if no piece of the vocabulary spans
    the beginning of a word, no merge of byte-pair encoding does. Other tokenizers encode whole texts.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._words = _Words(tokenizer) if tokenizer.splits_into_words else None

    def encode(self, text: str) -> NDArray[np.int32]:
        """Returns the token ids, without the end-of-document token."""
        if self._words is None:
            return np.array(self._tokenizer.encode(text), dtype=np.int32)
        if len(self._words) > _MAX_WORDS:
            self._words.clear()
        return np.fromiter(chain.from_iterable(map(self._words.__getitem__, self._tokenizer.words(text))), np.int32)


class _Words(dict[str, list[int]]):
    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self._encode = tokenizer.encode

    def __missing__(self, word: str) -> list[int]:
        tokens = self._encode(word)
        if len(word) <= _LONGEST_WORD:
            self[word] = tokens
        return tokens


@dataclass(frozen=True)
class Part:
    """The encoded documents of a unit.

    Attributes:
        tokens: tokens of all documents in order, each with its end-of-document token.
        digests: first 16 bytes of the SHA-256 of each document's text, as two numbers.
        validation: whether each document belongs to the validation data.
        numbers: index of each document among all records of the unit, including skipped ones.
        records: number of all records.
        refused: reason and index of each skipped record.
        content: SHA-256 of the raw documents.
    """

    tokens: NDArray[np.int32]
    lengths: NDArray[np.int32]
    text_bytes: NDArray[np.int64]
    digests: NDArray[np.uint64]
    validation: NDArray[np.bool_]
    numbers: NDArray[np.int64]
    records: int
    refused: list[tuple[str, int]]
    content: str

    def write(self, path: Path) -> None:
        """Writes the part atomically."""
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        facts = {"records": self.records, "refused": self.refused, "content": self.content}
        arrays: dict[str, Any] = {name: value for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        with temporary.open("wb") as stream:
            np.savez(stream, facts=np.frombuffer(json.dumps(facts).encode(), np.uint8), **arrays)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.rename(path)

    @classmethod
    def read(cls, path: Path) -> Part:
        """Reads a part; raises a UserError if it is damaged."""
        with _opened(path) as (stored, facts):
            return cls(**{name: stored[name] for name in stored.files if name != "facts"}, **facts)


def read_facts(path: Path, *names: str) -> list[Any]:
    """Reads single fields of a part without its tokens.

    Raises:
        UserError: the part is damaged.
    """
    with _opened(path) as (stored, facts):
        return [facts[name] if name in facts else stored[name] for name in names]


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Opens a part: its arrays, whose CRC is checked when they are read, and its facts."""
    try:
        with np.load(path) as stored:
            yield stored, json.loads(stored["facts"].tobytes())
    except FileNotFoundError:
        raise
    except Exception as error:  # any error of zip, numpy or JSON
        raise UserError(f"{path}: is damaged ({first_line(error)}); delete it and repeat the build") from None


def encode_unit(unit: Unit, json_key: str, validation_fraction: float, encoder: WordEncoder, eod: int) -> Part:
    """Reads and encodes the documents of a unit."""
    content = ContentHash()
    tokens: list[NDArray[np.int32]] = []
    text_bytes = []
    digests = []
    numbers = []
    refused = []
    records = 0
    end = np.array([eod], dtype=np.int32)
    for number, document in enumerate(content.watch(read_unit(unit, json_key))):
        records += 1
        try:
            text = text_of(document)
        except RefusedError as error:
            if error.reason != BLANK:
                refused.append((error.reason, number))
            continue
        encoded = text.encode("utf-8")
        text_bytes.append(len(encoded))
        digests.append(hashlib.sha256(encoded).digest()[:16])
        numbers.append(number)
        tokens += [encoder.encode(text), end]
    digest_D2 = np.frombuffer(b"".join(digests), ">u8").reshape(-1, 2).astype(np.uint64)
    lengths = [len(own) + 1 for own in tokens[::2]]
    # The text alone decides the split: order and number of workers have no effect, and copies stay in one split.
    validation = digest_D2[:, 0].astype(np.float64) / 2**64 < validation_fraction
    return Part(
        np.concatenate(tokens or [end[:0]]), np.array(lengths, np.int32), np.array(text_bytes, np.int64), digest_D2,
        validation, np.array(numbers, np.int64), records, refused, content.digest(),
    )  # fmt: skip


def hash_unit(task: tuple[Unit, str]) -> str:
    """SHA-256 of the raw documents of a unit."""
    content = ContentHash()
    for _ in content.watch(read_unit(*task)):
        pass
    return content.digest()


_encoder: tuple[WordEncoder, int]


def _start_encoder(parent: int, tokenizer_path: str) -> None:
    global _encoder  # noqa: PLW0603  (one per worker process, set by the pool)
    end_with_parent(parent)
    tokenizer = open_tokenizer(tokenizer_path)
    _encoder = WordEncoder(tokenizer), tokenizer.eod


def encode_to_file(task: tuple[Unit, str, float, Path]) -> tuple[int, int]:
    """Encodes a unit into a file; returns the number of documents and the bytes of their text."""
    unit, json_key, validation_fraction, path = task
    part = encode_unit(unit, json_key, validation_fraction, *_encoder)
    part.write(path)
    return len(part.lengths), int(part.text_bytes.sum())


def encode_all(
    tasks: Iterable[tuple[Unit, str, float, Path]], tokenizer: Path, workers: int
) -> Iterator[tuple[int, int]]:
    """Encodes units in ``workers`` processes; yields the number of documents and bytes of text of each.

    Raises:
        UserError: text is unusable, or a worker was killed.
    """
    return _in_processes(encode_to_file, tasks, workers, _start_encoder, (str(tokenizer),))


def hash_all(units: Iterable[Unit], json_key: str, workers: int) -> Iterator[str]:
    """Yields the SHA-256 of the raw documents of each unit, in order.

    Raises:
        UserError: text is unusable, or a worker was killed.
    """
    return _in_processes(hash_unit, ((unit, json_key) for unit in units), workers, end_with_parent, ())


def _in_processes(
    work: Callable[[Task], Done],
    tasks: Iterable[Task],
    workers: int,
    start: Callable[..., None],
    arguments: tuple[str, ...],
) -> Iterator[Done]:
    """Yields results in the order of the tasks, with a bounded number in flight, which bounds memory."""
    pending: deque[Future[Done]] = deque()
    context = multiprocessing.get_context("spawn")
    # The parent is passed explicitly: otherwise its death during a worker's imports would go unnoticed.
    with ProcessPoolExecutor(workers, context, start, (os.getpid(), *arguments)) as pool:
        try:
            for task in tasks:
                pending.append(pool.submit(work, task))
                if len(pending) > 2 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BaseException as error:
            # Does not wait: a worker that starts late would still read its input.
            pool.shutdown(wait=False, cancel_futures=True)
            if isinstance(error, BrokenProcessPool):
                raise UserError("a worker was killed, perhaps out of memory; use fewer --workers") from None
            raise
