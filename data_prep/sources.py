"""Sources of text, their division into units that workers read one at a time, and the documents of a unit."""

from __future__ import annotations

import codecs
import dataclasses
import hashlib
import json
import os
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from data_prep.formats import ARCHIVE, JSON, JSON_LINES, OBJECT, PARQUET, TEXT, form_of
from data_prep.json_values import json_values
from data_prep.packing import is_packed, named, unpacked
from data_prep.tables import HUB, document_of, hub_units, read_hub, read_rows, read_table, row_groups
from data_prep.units import RawDocument, Unit
from dynmoe.errors import UserError

STDLIB = "stdlib"
BLANK = "blank"
# Parts of the library that are not its source text: tests, installed packages, compiled files.
_STDLIB_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_UNIT_BYTES = (4_000_000, 64_000_000)
_UNITS_WANTED = 256
_ONE_DOCUMENT = (TEXT, OBJECT, ARCHIVE)
_LOOKS_AT_A_TIME = 16
_CURE = "use files with text, JSON, CSV or Parquet, folders of them, hf:DATASET or 'stdlib'"


@dataclass(frozen=True)
class RefusedError(Exception):
    """A raw document has no usable text.

    Attributes:
        reason: ``not_utf8``, ``empty``, ``bad_json``, ``missing_key``, ``bad_row`` (of a CSV file), ``archive``; or
            BLANK: a blank line between JSON lines, which does not count as a document.
    """

    reason: str


def text_of(document: RawDocument) -> str:
    """Decodes a document.

    Raises:
        RefusedError: the document has no text; the reason says why.
    """
    if document.refused is not None:
        raise RefusedError(document.refused)
    try:
        text = document.content.decode("utf-8")
    except UnicodeDecodeError:
        raise RefusedError("not_utf8") from None
    if document.json_key is not None:
        text = text.removeprefix("\ufeff")  # before the first line of a file, also of concatenated files
        if not text or text.isspace():
            raise RefusedError(BLANK)
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
        except UnicodeEncodeError:  # half of a surrogate pair, which JSON escapes can produce
            raise RefusedError("not_utf8") from None
    if not text.strip():
        raise RefusedError("empty")
    return text


@dataclass(frozen=True)
class _File:
    """A file of a source: its name relative to the source, path, size and modification time, and format."""

    name: str
    path: Path
    stamp: tuple[int, int]
    form: str


def list_units(sources: Sequence[str], read_as: str | None = None) -> list[Unit]:
    """Lists the units of all sources in the given order, sorted by path within a folder.

    Args:
        sources: files, folders, STDLIB, and datasets of the hub.
        read_as: format to assume for text files (``formats.DECLARED``) instead of detecting it.

    Raises:
        UserError: a source does not exist, cannot be read or contains no file.
    """
    found = {source: _look_at(source, read_as) for source in dict.fromkeys(sources) if not source.startswith(HUB)}
    smallest, largest = _UNIT_BYTES
    total = sum(file.stamp[0] for files in found.values() for file in files)
    size = min(max(total // _UNITS_WANTED, smallest), largest)
    return [
        dataclasses.replace(unit, source=source)
        for source in sources
        for unit in (hub_units(source) if source.startswith(HUB) else _units_of_files(found[source], size))
    ]


def _look_at(source: str, read_as: str | None) -> list[_File]:
    root = Path(sysconfig.get_paths()["stdlib"]) if source == STDLIB else Path(source)
    paths = list(_stdlib_files(root) if source == STDLIB else _files(root))
    if not paths:
        raise UserError(f"source {source}: contains no file; {_CURE}")

    def look(path: Path) -> _File:
        facts = path.stat()
        form = TEXT if source == STDLIB else form_of(path, read_as)
        if form == ARCHIVE and path == root:
            raise UserError(
                f"source {source}: is an archive or compressed by other means than gzip or Zstandard; unpack it"
            )
        name = path.name if path == root else path.relative_to(root).as_posix()
        return _File(name, path, (facts.st_size, facts.st_mtime_ns), form)

    with ThreadPoolExecutor(_LOOKS_AT_A_TIME) as pool:  # cluster file systems have high latency but serve many requests
        return list(pool.map(look, paths))


def _units_of_files(files: list[_File], size: int) -> list[Unit]:
    units: list[Unit] = []
    gathered: list[_File] = []
    gathered_bytes = 0
    for file in files:
        alone = file.form not in _ONE_DOCUMENT
        if gathered and (alone or gathered_bytes >= size):
            units.append(_unit("files", gathered))
            gathered = []
            gathered_bytes = 0
        if alone:
            units += _units_of_file(file, size)
        else:
            gathered.append(file)
            gathered_bytes += file.stamp[0]
    return [*units, _unit("files", gathered)] if gathered else units


def _units_of_file(file: _File, size: int) -> list[Unit]:
    """Units of a file that may contain many documents. Compressed files and tables of text cannot be split."""
    if file.form == PARQUET:
        return [_unit("rows", [file], first, last) for first, last in row_groups(file.path, size)]
    if file.form != JSON_LINES:
        return [_unit("values" if file.form == JSON else "table", [file])]
    with file.path.open("rb") as stored:
        if is_packed(stored.read(4)):
            return [_unit("packed", [file])]
    return [_unit("lines", [file], start, start + size) for start in range(0, max(file.stamp[0], 1), size)]


def _unit(kind: str, files: Sequence[_File], start: int = 0, stop: int = 0) -> Unit:
    names, paths, stamps = zip(*((file.name, str(file.path), file.stamp) for file in files), strict=True)
    return Unit(kind, names, paths, stamps, start, stop, forms=tuple(file.form for file in files))


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
    """Yields the documents of a unit in order.

    Raises:
        UserError: a file cannot be read, or has changed since the units were listed.
    """
    for path, stamp in zip(unit.paths, unit.stamps, strict=False):
        facts = os.stat(path)
        if (facts.st_size, facts.st_mtime_ns) != stamp:
            raise UserError(f"source {path}: was changed during the build; repeat the build")
    if unit.kind in ("files", "hub"):  # these readers name unreadable files themselves
        yield from _READERS[unit.kind](unit, json_key)
        return
    with named(unit.paths[0]):
        yield from _READERS[unit.kind](unit, json_key)


def _read_files(unit: Unit, json_key: str) -> Iterator[RawDocument]:
    for path, form in zip(unit.paths, unit.forms, strict=True):
        if form == ARCHIVE:
            yield RawDocument(b"", refused=ARCHIVE)
            continue
        with named(path), unpacked(path) as stream:
            content = stream.read()
        if form == OBJECT:
            yield RawDocument(content, json_key)
        else:
            yield RawDocument(content.removeprefix(codecs.BOM_UTF8))


def _read_lines(unit: Unit, json_key: str) -> Iterator[RawDocument]:
    if unit.stamps[0][0] == 0:
        yield RawDocument(b"")  # counted as empty
    with open(unit.paths[0], "rb") as stored:
        if unit.start:
            stored.seek(unit.start - 1)
            stored.readline()  # the rest of a line that belongs to the previous unit
        position = stored.tell()
        for line in stored if position < unit.stop else ():
            yield RawDocument(line, json_key)
            position += len(line)
            if position >= unit.stop:
                return


def _read_packed(unit: Unit, json_key: str) -> Iterator[RawDocument]:
    empty = True
    # Fingerprints of existing corpora hash the lines of Zstandard files without their line ends.
    end = b"" if unit.paths[0].endswith(".gz") else b"\n"
    with unpacked(unit.paths[0]) as lines:
        for line in lines:
            empty = False
            yield RawDocument(line.removesuffix(end), json_key)
    if empty:
        yield RawDocument(b"")


def _read_values(unit: Unit, json_key: str) -> Iterator[RawDocument]:
    """Yields objects with their text in a field, or strings that are texts."""
    with unpacked(unit.paths[0]) as stream:
        for value in json_values(stream):
            if isinstance(value, dict) and json_key not in value:
                yield RawDocument(json.dumps(dict.fromkeys(value)).encode(), json_key)  # keeps the names of its fields
            else:
                yield document_of(value[json_key] if isinstance(value, dict) else value)


_READERS = {
    "files": _read_files, "lines": _read_lines, "packed": _read_packed, "values": _read_values, "table": read_table,
    "rows": read_rows, "hub": read_hub,
}  # fmt: skip


def fingerprint(units: Sequence[Unit], digests: Iterable[str]) -> str:
    """SHA-256 over names and contents of all units, given the digests of their documents (:class:`ContentHash`)."""
    facts: list[list[object]] = []
    for unit, digest in zip(units, digests, strict=True):
        # Omits the form of text files, so that corpora made before forms existed stay current.
        forms = [unit.forms] if unit.kind == "files" and set(unit.forms) != {TEXT} else []
        facts.append([unit.kind, unit.names, unit.start, unit.stop, digest, *forms])
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


class ContentHash:
    """SHA-256 over the raw documents of a stream."""

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
    """SHA-256 of the units themselves; a resumed build uses it to detect changed input."""
    return hashlib.sha256(json.dumps([dataclasses.asdict(unit) for unit in units]).encode()).hexdigest()
