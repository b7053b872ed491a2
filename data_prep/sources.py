"""Where text comes from: sources, cut into units that workers read one at a time, and the documents of a unit."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import os
import sysconfig
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import zstandard

from data_prep.tables import HUB, hub_units, read_hub, read_rows, row_groups
from data_prep.units import RawDocument, Unit
from dynmoe.errors import UserError

STDLIB = "stdlib"
_PACKED = (".jsonl.gz", ".jsonl.zst")
# Not part of the library's own text: tests, installed packages, compiled files.
_STDLIB_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_UNIT_BYTES = (4_000_000, 64_000_000)
_UNITS_WANTED = 256
_CURE = "name text files, folders, .jsonl or .parquet files, hf:DATASET or 'stdlib'"


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


def list_units(sources: Sequence[str]) -> list[Unit]:
    """The units of all sources, in the order given; within a folder by path.

    Raises:
        UserError: a source that does not exist, cannot be read or holds no file.
    """
    found: dict[str, list[tuple[str, Path, os.stat_result]]] = {}
    for source in sources:
        if source.startswith(HUB):
            continue
        root = Path(sysconfig.get_paths()["stdlib"]) if source == STDLIB else Path(source)
        paths = list(_stdlib_files(root) if source == STDLIB else _files(root))
        if not paths:
            raise UserError(f"source {source}: holds no file; {_CURE}")
        found[source] = [(p.name if p == root else p.relative_to(root).as_posix(), p, p.stat()) for p in paths]
    smallest, largest = _UNIT_BYTES
    total = sum(facts.st_size for files in found.values() for *_, facts in files)
    size = min(max(total // _UNITS_WANTED, smallest), largest)
    return [
        unit
        for source in sources
        for unit in (hub_units(source) if source.startswith(HUB) else _units_of_files(found[source], size))
    ]


def _units_of_files(files: list[tuple[str, Path, os.stat_result]], size: int) -> list[Unit]:
    units: list[Unit] = []
    gathered: list[tuple[str, Path, os.stat_result]] = []

    def close() -> None:
        if gathered:
            names, paths, facts = zip(*gathered, strict=True)
            stamps = tuple((fact.st_size, fact.st_mtime_ns) for fact in facts)
            units.append(Unit("files", names, tuple(str(path) for path in paths), stamps))
            gathered.clear()

    for name, path, facts in files:
        alone = ((name,), (str(path),), ((facts.st_size, facts.st_mtime_ns),))
        if path.suffix not in (".jsonl", ".parquet") and not path.name.endswith(_PACKED):
            gathered.append((name, path, facts))
            if sum(fact.st_size for *_, fact in gathered) >= size:
                close()
            continue
        close()
        if path.suffix == ".jsonl":
            starts = range(0, max(facts.st_size, 1), size)
            units += [Unit("lines", *alone, start, start + size) for start in starts]
        elif path.suffix == ".parquet":
            units += [Unit("rows", *alone, first, last) for first, last in row_groups(path, size)]
        else:
            units.append(Unit("packed", *alone))
    close()
    return units


def _files(root: Path) -> Iterator[Path]:
    if root.is_file():
        yield root
    elif root.is_dir():
        yield from sorted(path for path in root.rglob("*") if path.is_file())
    else:
        raise UserError(f"source {root}: does not exist; {_CURE}")


def _stdlib_files(root: Path) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - _STDLIB_SKIPPED)
        for name in sorted(names):
            if name.endswith(".py"):
                yield Path(folder) / name


def read_unit(unit: Unit, json_key: str) -> Iterator[RawDocument]:
    """The documents of a unit, in their order.

    Raises:
        UserError: a file that cannot be read, or was changed since the units were listed.
    """
    for path, stamp in zip(unit.paths, unit.stamps, strict=False):
        facts = os.stat(path)
        if (facts.st_size, facts.st_mtime_ns) != stamp:
            raise UserError(f"source {path}: was changed while it was read; start again")
    try:
        yield from _READERS[unit.kind](unit, json_key)
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise UserError(f"source {unit.paths[0]}: cannot be read ({error}); mend or remove it") from None


def _read_files(unit: Unit, json_key: str) -> Iterator[RawDocument]:
    for path in unit.paths:
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise UserError(f"source {path}: cannot be read ({error}); mend or remove it") from None
        yield RawDocument(content)


def _read_lines(unit: Unit, json_key: str) -> Iterator[RawDocument]:
    if unit.stamps[0][0] == 0:
        yield RawDocument(b"")  # to be counted as empty
    with open(unit.paths[0], "rb") as stored:
        if unit.start:
            stored.seek(unit.start - 1)
            stored.readline()  # the end of a line that belongs to the unit before
        position = stored.tell()
        for line in stored if position < unit.stop else ():
            yield RawDocument(line, json_key)
            position += len(line)
            if position >= unit.stop:
                return


def _read_packed(unit: Unit, json_key: str) -> Iterator[RawDocument]:
    with open(unit.paths[0], "rb") as stored:
        lines: Iterable[bytes] = _lines(_decompressed(stored))
        if unit.paths[0].endswith(".gz"):
            lines = gzip.GzipFile(fileobj=stored)
        empty = True
        for line in lines:
            empty = False
            yield RawDocument(line, json_key)
        if empty:
            yield RawDocument(b"")


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


_READERS = {"files": _read_files, "lines": _read_lines, "packed": _read_packed, "rows": read_rows, "hub": read_hub}


def fingerprint(units: Sequence[Unit], digests: Iterable[str]) -> str:
    """SHA-256 over names and contents of all units, given those of their documents (see :class:`ContentHash`)."""
    facts = [[unit.kind, unit.names, unit.start, unit.stop, own] for unit, own in zip(units, digests, strict=True)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


class ContentHash:
    """SHA-256 over the raw documents that pass by."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def watch(self, documents: Iterable[RawDocument]) -> Iterator[RawDocument]:
        for document in documents:
            self._hash.update(len(document.content).to_bytes(8, "little"))
            self._hash.update(document.content)
            yield document

    def digest(self) -> str:
        return self._hash.hexdigest()


def stamp(units: Sequence[Unit]) -> str:
    """SHA-256 of the units themselves, by which an interrupted build knows that its input is still the same."""
    return hashlib.sha256(json.dumps([dataclasses.asdict(unit) for unit in units]).encode()).hexdigest()
