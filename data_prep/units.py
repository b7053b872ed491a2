"""The shares in which input is prepared, and what they consist of."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RawDocument:
    """Bytes of one document.

    Attributes:
        content: its text in UTF-8, or the JSON that holds it.
        json_key: the field of that JSON with the text.
        refused: why it has none, where its reader knows (see ``RefusedError``).
    """

    content: bytes
    json_key: str | None = None
    refused: str | None = None


@dataclass(frozen=True)
class Unit:
    """A share of the input that one worker prepares: the same whatever the number of workers and nodes.

    Attributes:
        kind: ``files`` (a document each), ``lines`` of a file of JSON lines (those that begin at bytes ``start`` to
            ``stop``), ``packed`` (a compressed one, whole), ``values`` (JSON in another layout, whole), ``table`` (CSV,
            whole), ``rows`` (row groups of a Parquet file) or ``hub`` (a shard of a dataset).
        names: of the files, relative to their source: the same text has the same names wherever it lies.
        paths: of the files.
        stamps: size and time of change of each file, by which a change in the middle of a build is found.
        source: as it was given; it does not count in the fingerprint.
        forms: what each file was found to be (``formats``).
    """

    kind: str
    names: tuple[str, ...]
    paths: tuple[str, ...]
    stamps: tuple[tuple[int, int], ...] = ()
    start: int = 0
    stop: int = 0
    source: str = ""
    forms: tuple[str, ...] = ()

    def document_name(self, number: int, before: int) -> str:
        """What document ``number`` of this unit is called, with ``before`` documents of the same file before it."""
        return self.names[number] if self.kind == "files" else f"{self.names[0]}:{before + number + 1}"
