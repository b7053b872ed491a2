"""Text to tokens in worker processes. Imports no torch, so that a worker starts quickly."""

from __future__ import annotations

import hashlib
import multiprocessing
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from data_prep.sources import RawDocument, RefusedError, text_of
from dynmoe.data.tokenizer import Tokenizer
from dynmoe.errors import UserError

# Documents, and the share of them that goes to validation.
Task = tuple[tuple[RawDocument, ...], float]

_DOCUMENTS_PER_TASK = 64


@dataclass(frozen=True)
class Encoded:
    """What a worker makes of one document: tokens, or the reason for having none."""

    name: str
    split: str
    tokens: np.ndarray | None
    text_bytes: int
    refused: str | None = None


_worker_tokenizer: Tokenizer


def start_worker(tokenizer_path: str) -> None:
    global _worker_tokenizer  # noqa: PLW0603  (one per worker process, set by the pool)
    _worker_tokenizer = Tokenizer(tokenizer_path)


def encode(task: Task) -> list[Encoded]:
    documents, validation_fraction = task
    return [_encode_one(document, validation_fraction) for document in documents]


def _encode_one(document: RawDocument, validation_fraction: float) -> Encoded:
    try:
        text = text_of(document)
    except RefusedError as refused:
        return Encoded(document.name, "", None, 0, refused.reason)
    content = text.encode("utf-8")
    # The text itself decides its split: neither order nor number of workers does, and copies stay together.
    draw = int.from_bytes(hashlib.sha256(content).digest()[:8], "big") / 2**64
    split = "validation" if draw < validation_fraction else "train"
    tokens = np.array([*_worker_tokenizer.encode(text), _worker_tokenizer.eod], dtype=np.int32)
    return Encoded(document.name, split, tokens, len(content))


def tasks(documents: Iterable[RawDocument], fraction: float) -> Iterator[Task]:
    iterator = iter(documents)
    while group := tuple(islice(iterator, _DOCUMENTS_PER_TASK)):
        yield group, fraction


def encode_in_order(work: Iterable[Task], tokenizer: Path, workers: int) -> Iterator[list[Encoded]]:
    """Encodes tasks in ``workers`` processes and yields the results in the order of the tasks.

    A bounded number of tasks is under way, so that memory does not grow with the corpus.

    Raises:
        UserError: a worker was killed.
    """
    pending: deque[Future[list[Encoded]]] = deque()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, start_worker, (str(tokenizer),)) as pool:
        try:
            for task in work:
                pending.append(pool.submit(encode, task))
                if len(pending) > 4 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool:
            raise UserError("a worker was killed, perhaps for want of memory; use fewer --workers") from None
