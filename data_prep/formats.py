"""Detects the format of a file by its first bytes, and by its name if these are ambiguous."""

from __future__ import annotations

import io
import json
import os
import re
from pathlib import Path
from typing import BinaryIO

from data_prep.json_values import NotJsonError, json_values
from data_prep.packing import ENDINGS, is_packed, named, unpack
from dynmoe.errors import UserError

TEXT = "text"
JSON_LINES = "jsonl"
JSON = "json"
CSV = "csv"
TSV = "tsv"
OBJECT = "object"
PARQUET = "parquet"
ARCHIVE = "archive"
# Formats that a user may declare (--as).
DECLARED = (TEXT, JSON_LINES, JSON, CSV, TSV)
_BY_NAME = {".jsonl": JSON_LINES, ".ndjson": JSON_LINES, ".json": JSON, ".csv": CSV, ".tsv": TSV}
_FIRST = 1 << 12
_HEAD = 1 << 18
_MAX_LINES = 100
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")
_PARQUET = b"PAR1"
# Archives, unsupported compression, and Arrow tables: each may contain many documents.
_is_archive = re.compile(
    rb"PK\x03\x04|BZh[1-9]1AY&SY|\xfd7zXZ\x00|7z\xbc\xaf\x27\x1c|\x04\x22\x4d\x18|ARROW1\x00\x00|.{257}ustar", re.DOTALL
).match
# The head begins with an object (or an array of objects), or one of its lines begins like an object.
_objects_begin = re.compile(rb'(?:\xef\xbb\xbf)?\s*\[?\s*\{\s*["}]').match
_has_line_of_json = re.compile(rb'^[ \t]*\{[ \t]*"', re.MULTILINE).search


def form_of(path: Path, declared: str | None) -> str:
    """Detects the format of a file, independent of where it is called. Reads at most 256 KiB.

    Args:
        declared: format to assume for text without looking. Compression, archives and Parquet are still detected.

    Raises:
        UserError: the file cannot be read, or contradicts its name.
    """
    with named(path), path.open("rb") as stored:
        start = stored.read(4)
        stored.seek(-len(start), os.SEEK_END)
        packed = is_packed(start)
        is_parquet = start == stored.read(4) == _PARQUET
        stream = unpack(stored)
        head = stream.read(_FIRST)
        name = path.name.lower()
        if name.endswith(ENDINGS):
            name = name.rpartition(".")[0]
            if head and not packed and not _is_archive(head):
                cure = "rename it if it is not compressed, else download it again"
                raise UserError(f"source {path}: is neither gzip nor Zstandard, despite its name; {cure}")
        if _is_archive(head) or (packed and head.startswith(_PARQUET)):
            return ARCHIVE
        if is_parquet or (name.endswith(".parquet") and not packed):
            return PARQUET
        by_name = _BY_NAME.get(Path(name).suffix)
        if declared is None and by_name is not None and head.startswith(_UTF_16) and b"\0" in head:
            raise UserError(f"source {path}: is UTF-16; convert it to UTF-8 with iconv -f UTF-16 -t UTF-8")
        if not head.strip() and len(head) < _FIRST and by_name != JSON_LINES:
            return TEXT  # counted as empty by the reader
        return declared or _text_form(head, stream, by_name)


def _text_form(head: bytes, stream: BinaryIO, by_name: str | None) -> str:
    """Detects the format of text that begins with ``head`` and continues in ``stream``."""
    if by_name in (JSON_LINES, JSON) or _objects_begin(head) or _has_line_of_json(head):
        head += stream.read(_HEAD - len(head))
        form = _json_form(head, by_name, whole=len(head) < _HEAD)
        if form is not None:
            return form
    return by_name or TEXT


def _json_form(head: bytes, by_name: str | None, whole: bool) -> str | None:
    """Detects the layout of JSON from its ``head`` (``whole``: all of it); None if it is not JSON."""
    text = head.decode("utf-8", "replace").removeprefix("\ufeff").lstrip()
    lines = text.split("\n")
    if not whole:
        lines.pop()  # probably incomplete
    lines = [line for line in lines if line.strip()][:_MAX_LINES]
    if by_name == JSON_LINES:
        # Any line may be broken. If an array continues after its first line, the file is an array despite its name.
        in_lines = not text.startswith("[") or (bool(lines) and _is_json(lines[0]))
        return JSON_LINES if in_lines else _values_form(text, whole)
    objects = [_is_json(line, dict) for line in lines]
    mostly_objects = 2 * sum(objects) >= len(objects) > 0
    if mostly_objects and objects[0]:
        return OBJECT if whole and len(lines) == 1 else JSON_LINES
    if by_name == JSON or _objects_begin(head):
        form = _values_form(text, whole)
        if form is not None:
            return form
    if mostly_objects or (by_name == JSON and any(objects)):
        return JSON_LINES
    if by_name != JSON:
        return None
    return OBJECT if whole else JSON  # a small file counts as a bad document, a large one is rejected


def _values_form(text: str, whole: bool) -> str | None:
    """Detects the layout of JSON that is not in lines, or of one line longer than ``text``."""
    values: list[object] = []
    try:
        for value in json_values(io.BytesIO(text.encode("utf-8", "replace"))):
            values.append(value)  # one by one, to keep the values before an error
    except NotJsonError as error:
        if whole or not error.cut:
            return None
    begins_with_object = text.startswith("{")
    if whole:
        return OBJECT if begins_with_object and len(values) == 1 else JSON
    return JSON_LINES if begins_with_object and not values and "\n" not in text else JSON


def _is_json(line: str, kind: type = object) -> bool:
    try:
        return isinstance(json.loads(line), kind)
    except (ValueError, RecursionError):
        return False
