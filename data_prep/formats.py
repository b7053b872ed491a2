"""What a file is: by its first bytes, and where these leave it open, by its name."""

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

TEXT, JSON_LINES, JSON, CSV, TSV = "text", "jsonl", "json", "csv", "tsv"
OBJECT, PARQUET, ARCHIVE = "object", "parquet", "archive"
# What text may be declared to be (--as).
DECLARED = (TEXT, JSON_LINES, JSON, CSV, TSV)
_BY_NAME = {".jsonl": JSON_LINES, ".ndjson": JSON_LINES, ".json": JSON, ".csv": CSV, ".tsv": TSV}
_FIRST = 1 << 12
_HEAD = 1 << 18
_LINES_LOOKED_AT = 100
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")
_PARQUET = b"PAR1"
# Archives, compression that is not read, and tables of Arrow: many documents may lie in each.
_is_archive = re.compile(
    rb"PK\x03\x04|BZh[1-9]1AY&SY|\xfd7zXZ\x00|7z\xbc\xaf\x27\x1c|\x04\x22\x4d\x18|ARROW1\x00\x00|.{257}ustar", re.DOTALL
).match
# An object whose first name begins, or an array of such, is the beginning; or a line begins like one.
_objects_begin = re.compile(rb'(?:\xef\xbb\xbf)?\s*\[?\s*\{\s*["}]').match
_has_line_of_json = re.compile(rb'^[ \t]*\{[ \t]*"', re.MULTILINE).search


def form_of(path: Path, declared: str | None) -> str:
    """What a file is, the same wherever it is asked. No more than 256 KiB of its content are read.

    Args:
        path: of the file.
        declared: what text is taken for, unseen. Compression, archives and Parquet are found all the same.

    Raises:
        UserError: a file that cannot be read, or that is not what its name says.
    """
    with named(path), path.open("rb") as stored:
        start = stored.read(4)
        stored.seek(-len(start), os.SEEK_END)
        packed, is_parquet = is_packed(start), start == stored.read(4) == _PARQUET
        stream = unpack(stored)
        head = stream.read(_FIRST)
        name = path.name.lower()
        if name.endswith(ENDINGS):
            name = name.rpartition(".")[0]
            if head and not packed and not _is_archive(head):
                cure = "name it otherwise if it is not compressed, else fetch it again"
                raise UserError(f"source {path}: is neither gzip nor Zstandard, as its name says; {cure}")
        if _is_archive(head) or (packed and head.startswith(_PARQUET)):
            return ARCHIVE
        if is_parquet or (name.endswith(".parquet") and not packed):
            return PARQUET
        by_name = _BY_NAME.get(Path(name).suffix)
        if declared is None and by_name is not None and head.startswith(_UTF_16) and b"\0" in head:
            raise UserError(f"source {path}: is UTF-16; make it UTF-8: iconv -f UTF-16 -t UTF-8")
        if not head.strip() and len(head) < _FIRST and by_name != JSON_LINES:
            return TEXT  # which counts it as empty
        return declared or _text_form(head, stream, by_name)


def _text_form(head: bytes, stream: BinaryIO, by_name: str | None) -> str:
    """What text is: of which ``head`` is the beginning, and ``stream`` has the rest."""
    if by_name in (JSON_LINES, JSON) or _objects_begin(head) or _has_line_of_json(head):
        head += stream.read(_HEAD - len(head))
        form = _json_form(head, by_name, whole=len(head) < _HEAD)
        if form is not None:
            return form
    return by_name or TEXT


def _json_form(head: bytes, by_name: str | None, whole: bool) -> str | None:
    """How JSON is laid out, of which ``head`` is the beginning or the whole; None where it is something else."""
    text = head.decode("utf-8", "replace").removeprefix("\ufeff").lstrip()
    lines = text.split("\n")
    if not whole:
        lines.pop()  # it may go on
    lines = [line for line in lines if line.strip()][:_LINES_LOOKED_AT]
    if by_name == JSON_LINES:
        # Any line may be broken there. What goes on after the line in which an array began is an array all the same.
        in_lines = not text.startswith("[") or (bool(lines) and _is_json(lines[0]))
        return JSON_LINES if in_lines else _values_form(text, whole)
    objects = [_is_json(line, dict) for line in lines]
    most = 2 * sum(objects) >= len(objects) > 0
    if most and objects[0]:
        return OBJECT if whole and len(lines) == 1 else JSON_LINES
    if by_name == JSON or _objects_begin(head):
        form = _values_form(text, whole)
        if form is not None:
            return form
    if most or (by_name == JSON and any(objects)):
        return JSON_LINES
    if by_name != JSON:
        return None
    return OBJECT if whole else JSON  # a small file is counted as a bad document, a large one is refused


def _values_form(text: str, whole: bool) -> str | None:
    """How JSON that is not in lines is laid out; and of a single line that is longer than ``text``, what it is."""
    values: list[object] = []
    try:
        for value in json_values(io.BytesIO(text.encode("utf-8", "replace"))):
            values.append(value)  # one by one: what came before an error counts
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
