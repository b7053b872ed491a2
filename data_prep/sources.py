"""Where text comes from: raw documents in a fixed order, not yet decoded."""

from __future__ import annotations

import gzip
import io
import json
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import zstandard

from dynmoe.errors import UserError

STDLIB = "stdlib"
_JSONL = (".jsonl", ".jsonl.gz", ".jsonl.zst")
# Not part of the library's own text: tests, installed packages, compiled files.
_STDLIB_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class RawDocument:
    """Bytes of one document; ``json_key`` names the field that holds the text of a JSONL line."""

    name: str
    content: bytes
    json_key: str | None = None


@dataclass(frozen=True)
class RefusedError(Exception):
    """Why a raw document has no text: ``not_utf8``, ``empty``, ``bad_json`` or ``missing_key``."""

    reason: str


def text_of(document: RawDocument) -> str:
    """Decodes a document.

    Raises:
        RefusedError: with the reason.
    """
    try:
        text = document.content.decode("utf-8")
    except UnicodeDecodeError:
        raise RefusedError("not_utf8") from None
    if document.json_key is not None:
        try:
            record = json.loads(text)
        except ValueError:
            raise RefusedError("bad_json") from None
        value = record.get(document.json_key) if isinstance(record, dict) else None
        if not isinstance(value, str):
            raise RefusedError("missing_key")
        text = value
    if not text.strip():
        raise RefusedError("empty")
    return text


def read_documents(sources: list[str], json_key: str) -> Iterator[RawDocument]:
    """Documents of all sources, in the order given; within a folder by path.

    Raises:
        UserError: a source that does not exist, cannot be read or holds no file.
    """
    for source in sources:
        root = Path(sysconfig.get_paths()["stdlib"]) if source == STDLIB else Path(source)
        files = list(_stdlib_files(root)) if source == STDLIB else list(_files(root))
        if not files:
            raise UserError(f"source {source}: holds no file; name a text file, a folder, a .jsonl file or 'stdlib'")
        for path in files:
            # Names are relative, so that the same text gives the same manifest wherever it lies.
            name = path.name if path == root else path.relative_to(root).as_posix()
            try:
                yield from _documents(path, name, json_key)
            except (OSError, EOFError, zstandard.ZstdError) as error:
                raise UserError(f"source {path}: cannot be read ({error}); mend or remove it") from None


def _files(root: Path) -> Iterator[Path]:
    if root.is_file():
        yield root
    elif root.is_dir():
        yield from sorted(path for path in root.rglob("*") if path.is_file())
    else:
        raise UserError(f"source {root}: does not exist; name a text file, a folder, a .jsonl file or 'stdlib'")


def _stdlib_files(root: Path) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - _STDLIB_SKIPPED)
        for name in sorted(names):
            if name.endswith(".py"):
                yield Path(folder) / name


def _documents(path: Path, name: str, json_key: str) -> Iterator[RawDocument]:
    if not path.name.endswith(_JSONL):
        yield RawDocument(name, path.read_bytes())
        return
    with path.open("rb") as compressed:
        stream: io.BufferedIOBase = compressed
        if path.suffix == ".gz":
            stream = gzip.GzipFile(fileobj=compressed)
        elif path.suffix == ".zst":
            stream = io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(compressed))
        for number, line in enumerate(stream, start=1):
            yield RawDocument(f"{name}:{number}", line, json_key)
