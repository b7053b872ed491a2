"""Texts for the token view, each with its source."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dynmoe.data.corpus import Corpus, source_names
from dynmoe.errors import UserError
from dynmoe.trained import TrainedModel


@dataclass(frozen=True)
class Text:
    """A document as text or token ids; ``source`` is the name of its domain."""

    source: str
    content: str | list[int]

    def tokens(self, model: TrainedModel) -> list[int]:
        return model.tokenizer.encode(self.content) if isinstance(self.content, str) else self.content


def read_texts(names: Sequence[str]) -> list[Text]:
    """Reads text files, JSON lines (fields ``text`` and, optionally, ``source``), or ``-`` for standard input.

    A file is read as JSON lines if it is named ``.jsonl`` or its first line is JSON with a text.

    Raises:
        UserError: a file cannot be read or contains no text.
    """
    sources = source_names(names)
    return [text for name in names for text in _read(name, sources[name])]


def _read(name: str, source: str) -> list[Text]:
    try:
        content = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"--text {name}: cannot be read ({error.strerror}); use a text file, or -") from None
    except UnicodeDecodeError:
        raise UserError(f"--text {name}: is not UTF-8; convert it to UTF-8") from None
    if not text.strip():
        raise UserError(f"--text {name}: contains no text; use another file")
    if name.endswith(".jsonl") or _begins_with_record(text):
        return list(_read_lines(name, text, source))
    return [Text("standard input" if name == "-" else source, text)]


def _begins_with_record(text: str) -> bool:
    try:
        record = json.loads(text.lstrip().split("\n", 1)[0])
    except (ValueError, RecursionError):
        return False
    return isinstance(record, dict) and isinstance(record.get("text"), str)


def _read_lines(name: str, text: str, source_of_file: str) -> Iterator[Text]:
    for number, line in enumerate(text.split("\n"), start=1):  # JSON strings may contain other line separators
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            content = record["text"]
            source = record.get("source", source_of_file)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            content = source = None
        if not isinstance(content, str) or not isinstance(source, str):
            raise UserError(f"--text {name}: line {number} has no text; use objects with the fields text and source")
        yield Text(source, content)


def validation_texts(model: TrainedModel, num_tokens: int) -> list[Text]:
    """The first validation documents of each corpus of the run, about ``num_tokens`` tokens in total.

    Raises:
        UserError: a corpus is missing, or was encoded with a different tokenizer.
    """
    dirs = model.config.data.dirs
    sources = source_names(dirs)
    texts = []
    for path in dirs:
        corpus = Corpus.open(path)
        stored = corpus.splits["validation"]
        if not corpus.tokenizer.encodes_like(model.tokenizer):
            raise UserError(f"data.dirs: {corpus.path} has a different tokenizer than the run; use --text")
        left = -(-num_tokens // len(dirs))
        start = 0
        tokens = np.memmap(stored.prefix.with_suffix(".bin"), dtype=stored.dtype, mode="r")
        for length in stored.lengths.tolist():
            if left <= 0:
                break
            texts.append(Text(sources[path], tokens[start : start + min(length, left)].tolist()))
            start += length
            left -= length
    return texts
