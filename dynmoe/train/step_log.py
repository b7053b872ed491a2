"""JSON lines that belong to steps, and that a resumed run cuts back to where it goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping
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
        lines = [line for line in _complete_lines(path, key) if json.loads(line)[key] <= step]
        write_atomically(path, "".join(f"{line}\n" for line in lines))
        self.last: dict[str, Any] = json.loads(lines[-1]) if lines else {}
        self._stream: TextIO = path.open("a")

    def append(self, entry: Mapping[str, Any]) -> None:
        self.last = dict(entry)
        self._stream.write(json.dumps(self.last) + "\n")
        self._stream.flush()

    def close(self) -> None:
        self._stream.close()


def _complete_lines(path: Path, key: str) -> list[str]:
    """Lines of ``path`` that hold a whole object: a kill may leave half of the last one."""
    if not path.exists():
        return []
    lines = []
    for line in path.read_text().splitlines():
        try:
            if key in json.loads(line):
                lines.append(line)
        except ValueError:
            continue
    return lines
