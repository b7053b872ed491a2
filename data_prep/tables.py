"""Sources that are tables: Parquet files, and datasets of the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.units import RawDocument, Unit
from dynmoe.errors import UserError, first_line

HUB = "hf:"


def _open_parquet(path: str | Path) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"source {path}: cannot be read ({first_line(error)}); mend or remove it") from None


def row_groups(path: Path, size: int) -> Iterator[tuple[int, int]]:
    """Ranges of row groups, each of about ``size`` bytes of columns."""
    metadata = _open_parquet(path).metadata
    first = gathered = 0
    for group in range(metadata.num_row_groups):
        gathered += metadata.row_group(group).total_byte_size
        if gathered >= size or group == metadata.num_row_groups - 1:
            yield first, group + 1
            first, gathered = group + 1, 0


def read_rows(unit: Unit, json_key: str) -> Iterator[RawDocument]:
    import pyarrow

    stored = _open_parquet(unit.paths[0])
    if json_key not in stored.schema_arrow.names:
        columns = ", ".join(stored.schema_arrow.names)
        raise UserError(f"--json-key {json_key}: {unit.paths[0]} has the columns {columns}; name the one with text")
    try:
        groups = range(unit.start, unit.stop)
        for batch in stored.iter_batches(batch_size=256, row_groups=groups, columns=[json_key]):
            for value in batch.column(0).to_pylist():
                yield _document_of(value)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"source {unit.paths[0]}: cannot be read ({first_line(error)}); mend or remove it") from None


def _document_of(value: object) -> RawDocument:
    """A document whose text is at hand; what is no text is refused as a line without its key would be."""
    return RawDocument(value.encode("utf-8", "surrogatepass")) if isinstance(value, str) else RawDocument(b"{}", "text")


def _open_hub(source: str) -> Any:
    """A streamed dataset: hf:NAME, hf:NAME:CONFIGURATION or hf:NAME:CONFIGURATION:SPLIT (train)."""
    try:
        import datasets
    except ImportError:
        raise UserError(f"source {source}: needs the package datasets; pip install 'dynmoe[hub]'") from None
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
            yield _document_of(row.get(json_key))
    except Exception as error:
        raise UserError(f"source {unit.paths[0]}: cannot be read ({first_line(error)}); start again") from None
