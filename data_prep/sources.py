"""Where text comes from: raw documents in a fixed order, not yet decoded."""

from __future__ import annotations

import gzip
import json
import os
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

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
        except (ValueError, RecursionError):
            raise RefusedError("bad_json") from None
        value = record.get(document.json_key) if isinstance(record, dict) else None
        if not isinstance(value, str):
            raise RefusedError("missing_key")
        text = value
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell
            raise RefusedError("not_utf8") from None
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
            except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
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
    with path.open("rb") as stored:
        lines: Iterable[bytes] = stored
        if path.suffix == ".gz":
            lines = gzip.GzipFile(fileobj=stored)
        elif path.suffix == ".zst":
            lines = _lines(_decompressed(stored))
        number = 0
        for number, line in enumerate(lines, start=1):
            yield RawDocument(f"{name}:{number}", line, json_key)
        if number == 0:
            yield RawDocument(name, b"")  # to be counted as empty


def _decompressed(stored: BinaryIO) -> Iterator[bytes]:
    """Contents of all zstandard frames.

    Raises:
        EOFError: the last frame is cut off (the library's own readers end there without a word).
    """
    frame = None
    while block := stored.read(1 << 20):
        while block:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            yield frame.decompress(block)
            block = frame.unused_data if frame.eof else b""
            if frame.eof:
                frame = None
    if frame is not None:
        raise EOFError("the compressed text is cut off")


def _lines(blocks: Iterable[bytes]) -> Iterator[bytes]:
    rest = b""
    for block in blocks:
        *whole, rest = (rest + block).split(b"\n")
        yield from whole
    if rest:
        yield rest
