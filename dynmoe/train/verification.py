"""Files that all ranks check together before a training, each its part, and the note that it was done.

Ranks meet every few seconds and tell how far they are. So a rank that waits for the others sees that they get on, as do
its watchdog and whoever looks at the screen; damage ends the check everywhere; and no collective takes long.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynmoe.data.corpus import MANIFEST, PREPARE_AGAIN, Corpus
from dynmoe.data.pieces import Checking, Piece, assign
from dynmoe.errors import UserError
from dynmoe.train.checkpoint import write_atomically

ROUND_S = 5.0
_SAID_EVERY_S = 30.0
_STAMP = ".verified.json"

# Gives what every rank has, in their order, for what this one has; collective.
Gather = Callable[[Any], list[Any]]


@dataclass(frozen=True)
class Report:
    """How far a rank is: bytes done of all of its own, at which file, what it found, whether it has ended."""

    done: int
    total: int
    place: str
    problem: str | None
    ended: bool


def check_together(
    checking: Checking, gather: Gather, rank: int, progress: Callable[[str], None], what: str
) -> str | None:
    """The first problem that any rank has found, the same on all of them; None where all is sound. Collective.

    Args:
        checking: this rank's part.
        gather: over the ranks.
        rank: of this process; the first one says now and then how far all are.
        progress: is told when the ranks together have got on.
        what: is checked, in words.
    """
    before, began = -1, time.monotonic()
    said = began
    try:
        while True:
            ended = checking.wait(ROUND_S)
            own = Report(checking.done, checking.total, checking.place, checking.problem, ended)
            reports: list[Report] = gather(own)
            if problem := next((report.problem for report in reports if report.problem is not None), None):
                return problem
            if all(report.ended for report in reports):
                return None
            done, total = sum(report.done for report in reports), sum(report.total for report in reports)
            if done > before:
                progress(f"the verification of {what} ({_slowest(reports)})")
                before = done
            now = time.monotonic()
            if rank == 0 and now - said > _SAID_EVERY_S:
                speed = done / 1e9 / (now - began)
                print(f"verifying {what}: {done / 1e9:.1f} of {total / 1e9:.1f} GB, {speed:.2f} GB/s", flush=True)
                said = now
    finally:
        checking.stop()


def _slowest(reports: Sequence[Report]) -> str:
    """The rank that has most to do, in words: where a check does not get on, it is most likely there."""
    rank, report = max(enumerate(reports), key=lambda item: item[1].total - item[1].done)
    return f"rank {rank} is at {report.place}"


@dataclass(frozen=True)
class Stamp:
    """What was true of a corpus when it was verified: its manifest, and size, time of change and inode of each file.

    It lies beside the corpus, or in ``other`` where that cannot be written to.
    """

    corpus: Path
    other: Path | None
    facts: dict[str, Any]

    @classmethod
    def of(cls, corpus: Corpus, other: Path | None) -> Stamp:
        """Of a corpus as it is now."""
        found = {name: (corpus.path / name).stat() for name in sorted(corpus.manifest["files"])}
        files = {name: [facts.st_size, facts.st_mtime_ns, facts.st_ino] for name, facts in found.items()}
        return cls(corpus.path, other, {MANIFEST: digest(corpus.manifest), **files})

    @property
    def _places(self) -> list[Path]:
        other = [] if self.other is None else [self.other / f"{digest(str(self.corpus.resolve()))[:16]}.json"]
        return [self.corpus / _STAMP, *other]

    def difference(self) -> str | None:
        """The file that is not as it was verified; '' where nothing was verified, None where all is as it was."""
        earlier = [facts for path in self._places if (facts := _read(path)) is not None]
        if self.facts in earlier:
            return None
        changed = (name for facts in earlier for name in self.facts if facts.get(name) != self.facts[name])
        return next(changed, "")

    def write(self) -> None:
        """Notes that the corpus was verified, where that can be."""
        for path in self._places:
            with contextlib.suppress(OSError):  # many may read a corpus that few may write to
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(path, json.dumps(self.facts, indent=1) + "\n")
                return


def _read(path: Path) -> dict[str, Any] | None:
    try:
        facts = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return None
    return facts if isinstance(facts, dict) else None


def digest(content: Any) -> str:
    """SHA-256 of what JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def alone(own: Any) -> list[Any]:
    """Gathers over this process alone."""
    return [own]


def over_ranks(own: Any) -> list[Any]:
    """Gathers over all ranks of the process group."""
    import torch.distributed as dist  # one process alone verifies before anything heavy is loaded

    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, own)
    return gathered


def verify_corpora(
    corpora: Sequence[Corpus],
    mode: str,
    directory: Path | None = None,
    gather: Gather = alone,
    rank: int = 0,
    progress: Callable[[str], None] = lambda doing: None,
) -> None:
    """Checks every hash and token id of corpora, of each once. Collective.

    Ranks that see the very same files share the work; hosts that keep copies of their own check each its own.

    Args:
        corpora: of a blend.
        mode: ``once``: unless it was done before and no file has changed; ``always``; ``never``.
        directory: for notes of what was verified, where a corpus cannot be written to; None: there are none then.
        gather: over the ranks that verify.
        rank: of this process among them.
        progress: is told when they get on.

    Raises:
        UserError: the file that differs, the same on every rank.
    """
    if mode == "never":
        return
    each = list({corpus.path.resolve(): corpus for corpus in corpora}.values())
    stamps = [Stamp.of(corpus, directory) for corpus in each]
    view = digest([stamp.facts for stamp in stamps])
    everywhere = gather((view, [stamp.difference() if mode == "once" else "" for stamp in stamps]))
    peers = [other for other, (seen, _) in enumerate(everywhere) if seen == view]
    pieces, done = list[Piece](), list[Stamp]()
    for corpus, stamp, difference in zip(each, stamps, everywhere[peers[0]][1], strict=True):
        if difference is None:
            continue
        if difference and rank == peers[0]:
            print(f"{corpus.path / difference} has changed since it was verified; verifying it again", flush=True)
        pieces += corpus.pieces()
        done.append(stamp)
    own = Checking(share(pieces, peers, rank))
    if problem := check_together(own, gather, rank, progress, "the data"):
        raise UserError(f"{problem}; {PREPARE_AGAIN}")
    if rank == peers[0]:
        for stamp in done:
            stamp.write()


def share(pieces: Sequence[Piece], ranks: Sequence[int], rank: int) -> list[Piece]:
    """The part of ``rank`` where all of ``ranks`` share the pieces."""
    return [pieces[number] for number in assign([piece.size for piece in pieces], len(ranks))[ranks.index(rank)]]
