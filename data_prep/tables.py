"""Tabular sources: Parquet and CSV files, and datasets of the Hugging Face hub."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_prep.formats import TSV
from data_prep.packing import DamagedError, unpacked, unreadable
from data_prep.units import RawDocument, Unit
from dynmoe.errors import UserError, first_line

HUB = "hf:"
_NAMES = 20
_LONGEST_NAME = 60
_LONGEST_FIELD = 1 << 28  # a longer field has an unmatched quotation mark


def _open_parquet(path: str | Path) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise unreadable(path, error) from None


def row_groups(path: Path, size: int) -> Iterator[tuple[int, int]]:
    """Yields ranges of row groups with about ``size`` bytes of columns each."""
    metadata = _open_parquet(path).metadata
    first = gathered = 0
    for group in range(metadata.num_row_groups):
        gathered += metadata.row_group(group).total_byte_size
        if gathered >= size or group == metadata.num_row_groups - 1:
            yield first, group + 1
            first = group + 1
            gathered = 0


def read_rows(unit: Unit, json_key: str) -> Iterator[RawDocument]:
    import pyarrow

    stored = _open_parquet(unit.paths[0])
    if json_key not in stored.schema_arrow.names:
        raise _no_column(json_key, unit.paths[0], stored.schema_arrow.names)
    try:
        groups = range(unit.start, unit.stop)
        for batch in stored.iter_batches(batch_size=256, row_groups=groups, columns=[json_key]):
            for value in batch.column(0).to_pylist():
                yield document_of(value)
    except (OSError, pyarrow.ArrowException) as error:
        raise unreadable(unit.paths[0], error) from None


def read_table(unit: Unit, json_key: str) -> Iterator[RawDocument]:
    """Yields the rows of a CSV or TSV file whose first row names the columns, skipping empty lines.

    The separator is a comma, a semicolon (written by spreadsheets with a decimal comma) or a tab: the one that yields a
    column ``json_key``. Rows with more or fewer fields than columns are refused, because their text may be incomplete.
    """
    path = unit.paths[0]
    csv.field_size_limit(_LONGEST_FIELD)
    found = {separator: _columns(path, separator) for separator in ("\t,;" if unit.forms == (TSV,) else ",;\t")}
    separator = next((separator for separator, columns in found.items() if json_key in columns), None)
    if separator is None:
        raise _no_column(json_key, path, max(found.values(), key=len))
    columns = found[separator]
    place = columns.index(json_key)
    with _rows(path, separator, strict=True) as rows:
        next(rows)
        for row in rows:
            if len(row) == len(columns):
                yield document_of(row[place])
            elif row:
                content = separator.join(row).encode("utf-8", "surrogatepass")
                yield RawDocument(content, refused="bad_row")


@contextmanager
def _rows(path: str, separator: str, strict: bool) -> Iterator[Any]:
    with unpacked(path) as stored:
        lines = io.TextIOWrapper(stored, "utf-8-sig", errors="surrogateescape", newline="")
        rows = csv.reader(lines, delimiter=separator, strict=strict)
        try:
            yield rows
        except csv.Error as error:
            raise DamagedError(f"line {rows.line_num}: {error}") from None


def _columns(path: str, separator: str) -> list[str]:
    with _rows(path, separator, strict=False) as rows:
        return next(rows, [])


def _no_column(json_key: str, path: str, columns: Sequence[str]) -> UserError:
    return UserError(f"--key {json_key}: {path} has the columns {listed(columns)}; use the one that contains the text")


def listed(names: Sequence[str]) -> str:
    """Lists names of columns or fields in one line of bounded length."""
    shown = [" ".join(name[:_LONGEST_NAME].split()) for name in names[:_NAMES]]
    return ", ".join(shown) + (", …" if len(names) > _NAMES else "")


def document_of(value: object) -> RawDocument:
    """Returns the document of a value; a value that is not text is refused like a line without its key."""
    if isinstance(value, str):
        return RawDocument(value.encode("utf-8", "surrogatepass"))
    return RawDocument(b"{}", refused="missing_key")


def _open_hub(source: str) -> Any:
    """Opens a streamed dataset: hf:NAME, hf:NAME:CONFIGURATION or hf:NAME:CONFIGURATION:SPLIT (default: train)."""
    try:
        import datasets
    except ImportError:
        raise UserError(f"source {source}: needs the package datasets; run pip install 'dynmoe[hub]'") from None
    name, configuration, split = (*source.removeprefix(HUB).split(":"), "", "")[:3]
    try:
        return datasets.load_dataset(name, configuration or None, split=split or "train", streaming=True)
    except Exception as error:
        cure = "check its name, configuration and split (hf:NAME:CONFIGURATION:SPLIT) and the network"
        raise UserError(f"source {source}: cannot be opened ({first_line(error)}); {cure}") from None


def hub_units(source: str) -> list[Unit]:
    shards = _open_hub(source).num_shards
    return [Unit("hub", (f"{source}#{number}",), (source,), start=number, stop=shards) for number in range(shards)]


def read_hub(unit: Unit, json_key: str) -> Iterator[RawDocument]:
    shard = _open_hub(unit.paths[0]).shard(num_shards=unit.stop, index=unit.start)
    try:
        for row in shard:
            yield document_of(row.get(json_key))
    except Exception as error:
        raise UserError(f"source {unit.paths[0]}: cannot be read ({first_line(error)}); repeat the build") from None
