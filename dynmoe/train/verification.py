"""Verification of files, shared by all ranks before training, and a record of completed verifications.

Every few seconds the ranks gather their progress. So a waiting rank, its watchdog and the user see that the others
progress, corruption stops the verification on all ranks, and no collective waits for long.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynmoe.data import PREPARE_AGAIN
from dynmoe.data.corpus import MANIFEST, Corpus
from dynmoe.data.pieces import Checking, Piece, assign, damage_of
from dynmoe.errors import UserError
from dynmoe.train.checkpoint import write_atomically

ROUND_S = 5.0
_PRINT_EVERY_S = 30.0
_STAMP = ".verified.json"

# Gathers one object from every rank, in rank order; collective.
Gather = Callable[[Any], list[Any]]


@dataclass(frozen=True)
class Report:
    """Progress of a rank: verified and total bytes, current file, problem found, whether it has finished."""

    done: int
    total: int
    place: str
    problem: Exception | None
    ended: bool


def check_together(
    checking: Checking, gather: Gather, rank: int, progress: Callable[[str], None], what: str
) -> str | None:
    """The first damage found by any rank, the same on all ranks; None if all files are valid. Collective.

    Args:
        checking: verification of this rank's share.
        gather: gathers over the ranks.
        rank: rank of this process; rank 0 prints the progress from time to time.
        progress: called when any rank has progressed.
        what: description of the files.

    Raises:
        UnreadableError: a rank cannot read a file; raised on all ranks.
    """
    before = -1
    start = time.monotonic()
    printed = start
    try:
        while True:
            ended = checking.wait(ROUND_S)
            own = Report(checking.done, checking.total, checking.place, checking.problem, ended)
            reports: list[Report] = gather(own)
            if problem := next((report.problem for report in reports if report.problem is not None), None):
                return damage_of(problem)
            if all(report.ended for report in reports):
                return None
            done = sum(report.done for report in reports)
            total = sum(report.total for report in reports)
            if done > before:
                progress(f"the verification of {what} ({_slowest(reports)})")
                before = done
            now = time.monotonic()
            if rank == 0 and now - printed > _PRINT_EVERY_S:
                speed = done / 1e9 / (now - start)
                print(f"verifying {what}: {done / 1e9:.1f} of {total / 1e9:.1f} GB, {speed:.2f} GB/s", flush=True)
                printed = now
    finally:
        checking.stop()


def _slowest(reports: Sequence[Report]) -> str:
    """Describes the rank with the most bytes left, which is the likely one if the verification hangs."""
    rank, report = max(enumerate(reports), key=lambda item: item[1].total - item[1].done)
    return f"rank {rank} is at {report.place}"


@dataclass(frozen=True)
class Stamp:
    """Record of a verified corpus: hash of its manifest; size, modification time and inode of each file.

    It is stored in the corpus directory, or in ``other`` if that is read-only. There, each host with a copy of its own
    has a record.
    """

    corpus: Path
    other: Path | None
    facts: dict[str, Any]

    @classmethod
    def of(cls, corpus: Corpus, other: Path | None) -> Stamp:
        """The record of a corpus in its current state."""
        found = {name: (corpus.path / name).stat() for name in sorted(corpus.manifest["files"])}
        files = {name: [facts.st_size, facts.st_mtime_ns, facts.st_ino] for name, facts in found.items()}
        return cls(corpus.path, other, {MANIFEST: digest(corpus.manifest), **files})

    @property
    def _name(self) -> tuple[str, str]:
        """Both parts of its name in ``other``: whose it is, and what it says."""
        return digest([str(self.corpus.resolve()), socket.gethostname()])[:16], digest(self.facts)[:16]

    def _found(self, name: str) -> list[dict[str, Any]]:
        """The record in the corpus directory, and those in ``other`` whose name fits this pattern."""
        others = [] if self.other is None else sorted(self.other.glob(f"{name}.json"))
        return [record for path in (self.corpus / _STAMP, *others) if (record := _read(path)) is not None]

    def difference(self) -> str | None:
        """A file that has changed since the verification; '' without a verification, None if nothing has changed."""
        own, facts = self._name
        if self.facts in self._found(f"*-{facts}"):
            return None
        earlier = self._found(f"{own}-*")
        changed = (name for facts in earlier for name in self.facts if facts.get(name) != self.facts[name])
        return next(changed, "")

    def write(self) -> None:
        """Stores the record, if a directory for it is writable."""
        other = [] if self.other is None else [self.other / f"{'-'.join(self._name)}.json"]
        for path in (self.corpus / _STAMP, *other):
            with contextlib.suppress(OSError):  # a shared corpus is often read-only
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
    """SHA-256 of a JSON-serializable object."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def gather_alone(own: Any) -> list[Any]:
    """Gathers from this process only."""
    return [own]


def gather_ranks(own: Any) -> list[Any]:
    """Gathers from all ranks of the process group."""
    import torch.distributed as dist  # a single process verifies before heavy imports

    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, own)
    return gathered


def verify_corpora(
    corpora: Sequence[Corpus],
    mode: str,
    directory: Path | None = None,
    gather: Gather = gather_alone,
    rank: int = 0,
    progress: Callable[[str], None] = lambda doing: None,
) -> None:
    """Verifies every hash and token id of each corpus. Collective.

    Ranks that see the same files share the work; hosts with copies of their own verify their copies.

    Args:
        corpora: corpora of a blend, possibly with repetitions.
        mode: ``once``: skip corpora that were verified before and have not changed; ``always``; ``never``.
        directory: directory for the records of read-only corpora; None: no such records.
        gather: gathers over the ranks that verify.
        rank: rank of this process among them.
        progress: called when the ranks progress.

    Raises:
        UserError: names the corrupt file, or a corpus of which hosts have different copies; the same on every rank.
        UnreadableError: names a file that a rank cannot read.
    """
    _check_same(corpora, gather)
    if mode == "never":
        return
    each = list({corpus.path.resolve(): corpus for corpus in corpora}.values())
    stamps = [Stamp.of(corpus, directory) for corpus in each]
    view = digest([stamp.facts for stamp in stamps])
    everywhere = gather((view, [stamp.difference() if mode == "once" else "" for stamp in stamps]))
    peers = [other for other, (seen, _) in enumerate(everywhere) if seen == view]
    pieces: list[Piece] = []
    done: list[Stamp] = []
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


def _check_same(corpora: Sequence[Corpus], gather: Gather) -> None:
    """Refuses copies that are different corpora; collective."""
    everywhere = gather((socket.gethostname(), [corpus.fingerprint for corpus in corpora]))
    (first, own), *others = everywhere
    for host, fingerprints in others:
        for corpus, here, there in zip(corpora, own, fingerprints, strict=True):
            if here != there:
                problem = f"is another corpus on {host} than on {first}"
                raise UserError(f"data.dirs: {corpus.path} {problem}; copy one to both")


def share(pieces: Sequence[Piece], ranks: Sequence[int], rank: int) -> list[Piece]:
    """The pieces of ``rank`` when they are divided among ``ranks``."""
    return [pieces[number] for number in assign([piece.size for piece in pieces], len(ranks))[ranks.index(rank)]]
