"""JSON lines that belong to steps, and that a resumed run cuts back to where it goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from dynmoe.train.checkpoint import write_atomically


class StepLog:
    """Appends objects to ``path``, one per line; ``last`` is the newest, empty before the first.

    Args:
        path: the file.
        key: the entry that holds an object's step.
        step: the step that the run resumes from; later lines are cut off, as they will come again.
    """

    def __init__(self, path: Path, key: str, step: int) -> None:
        kept = [(line, entry) for line, entry in _sound_lines(path, key) if entry[key] <= step]
        write_atomically(path, b"".join(line + b"\n" for line, _ in kept))
        self.last: dict[str, Any] = kept[-1][1] if kept else {}
        self._stream: TextIO = path.open("a")

    def append(self, entry: Mapping[str, Any]) -> None:
        self.last = dict(entry)
        self._stream.write(json.dumps(self.last) + "\n")
        self._stream.flush()

    def close(self) -> None:
        self._stream.close()


def merge(path: Path, key: str, step: int, entries: Mapping[str, Any]) -> None:
    """Adds ``entries`` to the object of ``step``, which is made in its place where there is none.

    Of a log that nobody has open.
    """
    found = {entry[key]: entry for _, entry in _sound_lines(path, key)}
    found[step] = {key: step, **found.get(step, {}), **entries}
    write_atomically(path, "".join(json.dumps(found[own]) + "\n" for own in sorted(found)))


def _sound_lines(path: Path, key: str) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Lines of ``path`` and their objects; without what has no step: a kill may leave half of the last line."""
    for line in path.read_bytes().split(b"\n") if path.exists() else ():
        try:
            entry = json.loads(line.decode())
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict) and isinstance(entry.get(key), (int, float)):
            yield line, entry
