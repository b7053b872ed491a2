"""The shares in which input is prepared, and what they consist of."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RawDocument:
    """Bytes of one document; ``json_key`` names the field that holds the text of a JSONL line."""

    content: bytes
    json_key: str | None = None


@dataclass(frozen=True)
class Unit:
    """A share of the input that one worker prepares: the same whatever the number of workers and nodes.

    Attributes:
        kind: ``files`` (a document each), ``lines`` of a .jsonl file (those that begin at bytes ``start`` to ``stop``),
            ``packed`` (a compressed one, whole), ``rows`` (row groups of a .parquet file) or ``hub`` (a shard of a
            dataset).
        names: of the files, relative to their source: the same text has the same names wherever it lies.
        paths: of the files.
        stamps: size and time of change of each file, by which a change in the middle of a build is found.
    """

    kind: str
    names: tuple[str, ...]
    paths: tuple[str, ...]
    stamps: tuple[tuple[int, int], ...] = ()
    start: int = 0
    stop: int = 0

    def document_name(self, number: int, before: int) -> str:
        """What document ``number`` of this unit is called, with ``before`` documents of the same file before it."""
        return self.names[number] if self.kind == "files" else f"{self.names[0]}:{before + number + 1}"
