"""Units of work into which input is divided, and the documents in them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RawDocument:
    """Bytes of one document.

    Attributes:
        content: its text in UTF-8, or the JSON that contains it.
        json_key: the field of that JSON that contains the text.
        refused: why it has no text, if its reader knows (see ``RefusedError``).
    """

    content: bytes
    json_key: str | None = None
    refused: str | None = None


@dataclass(frozen=True)
class Unit:
    """A part of the input for one worker, independent of the number of workers and nodes.

    Attributes:
        kind: ``files`` (one document each), ``lines`` of a JSON lines file (those that begin at bytes ``start`` to
            ``stop``), ``packed`` (a whole compressed one), ``values`` (a whole file in another JSON layout), ``table``
            (a whole CSV file), ``rows`` (row groups of a Parquet file) or ``hub`` (a shard of a dataset).
        names: names of the files relative to their source, so that they do not depend on where the text lies.
        stamps: size and modification time of each file, to detect changes during a build.
        source: the source as given by the user; not part of the fingerprint.
        forms: detected format of each file (``formats``).
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
        """Name of document ``number`` of this unit, which follows ``before`` documents in the same file."""
        return self.names[number] if self.kind == "files" else f"{self.names[0]}:{before + number + 1}"
