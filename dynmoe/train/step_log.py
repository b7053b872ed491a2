"""Logs of JSON lines with one entry per step, which a resumed run truncates to its first step."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from dynmoe.train.checkpoint import write_atomically


class StepLog:
    """Appends objects to ``path``, one per line; ``last`` is the latest one, empty if there is none.

    Args:
        path: the file.
        key: key of an object's step.
        step: the step from which the run resumes; later lines are removed, as they will be written again.
    """

    def __init__(self, path: Path, key: str, step: int) -> None:
        kept = [(line, entry) for line, entry in _valid_lines(path, key) if entry[key] <= step]
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
    """Adds ``entries`` to the object of ``step``, which is created if missing. The log must not be open elsewhere."""
    found = {entry[key]: entry for _, entry in _valid_lines(path, key)}
    found[step] = {key: step, **found.get(step, {}), **entries}
    write_atomically(path, "".join(json.dumps(found[own]) + "\n" for own in sorted(found)))


def _valid_lines(path: Path, key: str) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yields the lines of ``path`` that have a step, and their objects; a kill may truncate the last line."""
    for line in path.read_bytes().split(b"\n") if path.exists() else ():
        try:
            entry = json.loads(line.decode())
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict) and isinstance(entry.get(key), (int, float)):
            yield line, entry
