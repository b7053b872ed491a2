"""Merges parts into a corpus: removes copies of documents, concatenates tokens, writes indices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.encode import Part, read_facts
from data_prep.units import Unit
from dynmoe.data.corpus import SPLITS
from dynmoe.data.indexed import token_type, write_index

_NAMES_PER_REASON = 20
# Digests to compare at a time; each takes 24 bytes with its position.
_DIGESTS_AT_A_TIME = 16_000_000


@dataclass
class SplitCounts:
    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0


@dataclass
class Refusals:
    """Skipped documents: counts by reason, and the names of the first of each."""

    counts: dict[str, int] = field(default_factory=dict)
    names: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, name: Callable[[], str], count: int = 1) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + count
        names = self.names.setdefault(reason, [])
        if len(names) < _NAMES_PER_REASON:
            names.append(name())

    def __str__(self) -> str:
        """``skipped: empty 3 (a.txt); ``: each reason with its first document; empty if there are none."""
        reasons = ", ".join(f"{reason} {count} ({self.names[reason][0]})" for reason, count in self.counts.items())
        return reasons and f"skipped: {reasons}; "


@dataclass
class Merged:
    """The merged documents: counts and token occurrences by split, and the skipped documents."""

    counts: dict[str, SplitCounts]
    occurrences: dict[str, NDArray[np.int64]]
    refusals: Refusals


def find_copies(parts: Sequence[Path], at_a_time: int = _DIGESTS_AT_A_TIME) -> list[NDArray[np.bool_]]:
    """Marks in each part the documents with the text of an earlier one, by 128 bits of SHA-256.

    Digests are compared by residue class, so that only about ``at_a_time`` are in memory at once.
    """
    lengths = [len(read_facts(part, "lengths")[0]) for part in parts]
    copies = [np.zeros(length, dtype=np.bool_) for length in lengths]
    classes = max(1, -(-sum(lengths) // at_a_time))
    for residue in range(classes):
        digests = []
        places = []
        for number, part in enumerate(parts):
            own_D2 = read_facts(part, "digests")[0]
            chosen = np.flatnonzero(own_D2[:, 1] % np.uint64(classes) == residue)
            digests.append(own_D2[chosen])
            places.append(np.stack([np.full(len(chosen), number), chosen]).astype(np.int32))
        digest_D2 = np.concatenate(digests)
        place_2D = np.concatenate(places, axis=1)
        order = np.lexsort((digest_D2[:, 1], digest_D2[:, 0]))  # stable: the first of equal texts stays first
        same = np.flatnonzero((digest_D2[order[1:]] == digest_D2[order[:-1]]).all(axis=1))
        for number, document in place_2D[:, order[same + 1]].T:
            copies[number][document] = True
    return copies


def merge(parts: Sequence[Path], units: Sequence[Unit], directory: Path, vocab_size: int, deduplicate: bool) -> Merged:
    """Writes .bin and .idx of both splits into ``directory``, with the documents in the order of the units."""
    dtype = token_type(vocab_size)
    merged = Merged(
        {split: SplitCounts() for split in SPLITS},
        {split: np.zeros(vocab_size, dtype=np.int64) for split in SPLITS},
        Refusals(),
    )
    copies = find_copies(parts) if deduplicate else None
    lengths = {split: directory / f"{split}.lengths" for split in SPLITS}
    streams = {path: path.open("wb") for split in SPLITS for path in (directory / f"{split}.bin", lengths[split])}
    before = 0
    for number, unit in enumerate(units):
        part = Part.read(parts[number])
        if unit.start == 0 or unit.names != units[number - 1].names:  # a file begins
            before = 0
        kept = np.ones(len(part.lengths), dtype=np.bool_) if copies is None else ~copies[number]
        _count_refused(part, unit, kept, before, merged.refusals)
        before += part.records
        for split in SPLITS:
            chosen = kept & (part.validation == (split == "validation"))
            tokens = part.tokens[np.repeat(chosen, part.lengths)]
            streams[directory / f"{split}.bin"].write(tokens.astype(dtype).tobytes())
            streams[lengths[split]].write(part.lengths[chosen].tobytes())
            count = merged.counts[split]
            count.documents += int(chosen.sum())
            count.tokens += len(tokens)
            count.text_bytes += int(part.text_bytes[chosen].sum())
            merged.occurrences[split] += np.bincount(tokens, minlength=vocab_size)
    for stream in streams.values():
        stream.close()
    for split, path in lengths.items():
        stored = np.memmap(path, np.int32, "r") if path.stat().st_size else np.empty(0, np.int32)
        write_index(directory / split, dtype, stored)
        path.unlink()
    return merged


def _count_refused(part: Part, unit: Unit, kept: NDArray[np.bool_], before: int, refusals: Refusals) -> None:
    copies = [("copy", int(part.numbers[document])) for document in np.flatnonzero(~kept)]
    for reason, number in sorted([*part.refused, *copies], key=lambda refused: refused[1]):
        refusals.add(reason, lambda number=number: unit.document_name(number, before))  # type: ignore[misc]
