"""A summary of the sources, printed before they are read: detected formats, and how the text begins."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

from data_prep.formats import ARCHIVE, CSV, JSON, JSON_LINES, OBJECT, PARQUET, TEXT, TSV
from data_prep.sources import BLANK, RefusedError, read_unit, text_of
from data_prep.tables import listed
from data_prep.units import RawDocument, Unit

_CHARACTERS = 60
_DESCRIPTIONS = {
    TEXT: "read as text, one document per file",
    OBJECT: "read as JSON, one object per file",
    JSON_LINES: "read as JSON lines",
    JSON: "read as JSON, an array or concatenated values",
    CSV: "read as CSV",
    TSV: "read as TSV",
    PARQUET: "read as Parquet",
    ARCHIVE: "skipped: an archive, or compressed by other means than gzip or Zstandard",
}


def overview(units: Sequence[Unit], json_key: str) -> list[str]:
    """Returns a line for each source and format, with the beginning of its first document.

    Raises:
        UserError: that document cannot be read.
    """
    paths: dict[tuple[str, str], set[str]] = {}
    first: dict[tuple[str, str], Unit] = {}
    for unit in units:
        for number, path in enumerate(unit.paths):
            kind = unit.source, unit.forms[number] if unit.forms else ""
            if kind not in paths:
                paths[kind] = set()
                first[kind] = _alone(unit, number)
            paths[kind].add(path)
    return [
        f"{source}: {_chosen(len(paths[source, form]), form)}; {_beginning(unit, json_key)}"
        for (source, form), unit in first.items()
    ]


def _chosen(files: int, form: str) -> str:
    return f"{files} {'file' if files == 1 else 'files'} {_DESCRIPTIONS[form]}" if form else "read as a stream"


def _alone(unit: Unit, number: int) -> Unit:
    """Returns the unit with only one of its files."""
    if len(unit.paths) == 1:
        return unit
    one = slice(number, number + 1)
    return dataclasses.replace(
        unit, names=unit.names[one], paths=unit.paths[one], stamps=unit.stamps[one], forms=unit.forms[one]
    )


def _beginning(unit: Unit, json_key: str) -> str:
    for number, document in enumerate(read_unit(unit, json_key)):
        name = unit.document_name(number, 0)
        try:
            words = " ".join(text_of(document).split())
        except RefusedError as error:
            if error.reason == BLANK:
                continue
            return f"{name} has no text ({error.reason}{_fields(document) if error.reason == 'missing_key' else ''})"
        shown = "".join(character if character.isprintable() else "?" for character in words[:_CHARACTERS])
        return f'{name} begins "{shown}{"…" if len(words) > _CHARACTERS else ""}"'
    return f"{unit.names[0]} contains no document"


def _fields(document: RawDocument) -> str:
    record = json.loads(document.content.decode("utf-8").removeprefix("\ufeff"))
    fields = list(record) if isinstance(record, dict) else []
    return f"; its fields: {listed(fields)}" if fields else ""
