"""Verification before training: shared by all ranks, once per corpus, within the watchdog's timeout."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from dynmoe.config.guard import GuardConfig
from dynmoe.data.corpus import MANIFEST, TOKEN_FILES, Corpus
from dynmoe.data.indexed import write_index
from dynmoe.data.pieces import BLOCK_BYTES, Checking, Piece, assign
from dynmoe.data.sentencepiece_tokenizer import TOKENIZER_MODEL
from dynmoe.errors import UserError
from dynmoe.train import verification
from dynmoe.train.checkpoint import pieces_of
from dynmoe.train.checkpoint_store import CheckpointStore
from dynmoe.train.verification import check_together, gather_ranks, verify_corpora
from tests.data.test_pieces import in_blocks
from tests.faults.test_corpora import edit_manifest

FILES = (TOKENIZER_MODEL, *TOKEN_FILES)

TIMEOUT_S = GuardConfig().hang_timeout_s
# Assumed read bandwidth of one host (10 Gbit/s) and of the file system for all hosts.
BYTES_PER_S_OF_A_HOST = 1.25e9
BYTES_PER_S_OF_ALL = 25e9
RANKS = 512
RANKS_OF_A_HOST = 8


@dataclass
class SimulatedCheck:
    """Simulates ``Checking`` on one of many ranks, which read at fixed speeds in simulated time."""

    totals: list[int]
    speeds: list[float]
    rank: int
    now: float = 0.0
    heard: list[float] = field(default_factory=list)

    def done_by(self, rank: int) -> int:
        return min(self.totals[rank], int(self.now * self.speeds[rank]))

    def left_s(self, rank: int) -> float:
        left = self.totals[rank] - self.done_by(rank)
        return left / self.speeds[rank] if left and self.speeds[rank] else float("inf") if left else 0.0

    done = property(lambda self: self.done_by(self.rank))
    total = property(lambda self: self.totals[self.rank])
    place = "somewhere"
    problem = None

    def wait(self, seconds: float) -> bool:
        """Advances the time of all ranks until the end of the round."""
        self.now += min(seconds, max(self.left_s(rank) for rank in range(len(self.totals)))) + 1e-6
        if self.now - max(self.heard, default=0.0) > TIMEOUT_S:
            raise TimeoutError("the watchdog kills the rank")
        return self.done == self.total

    def stop(self) -> None:
        pass

    def gather(self, own: verification.Report) -> list[verification.Report]:
        reports = []
        for rank, total in enumerate(self.totals):
            done = self.done_by(rank)
            reports.append(verification.Report(done, total, "somewhere", None, done == total))
        assert own == reports[self.rank]
        return reports

    def run(self) -> float:
        """The duration of the verification in seconds."""
        heard = partial(SimulatedCheck._hear, self)
        assert check_together(self, self.gather, self.rank, heard, "the data") is None  # type: ignore[arg-type]
        return self.now

    def _hear(self, doing: str) -> None:
        self.heard.append(self.now)


def simulate(pieces: list[Piece], reading: int = RANKS, stuck: int | None = None) -> float:
    """Seconds until all ranks have verified the pieces, as seen by the rank that waits longest.

    Args:
        pieces: pieces of a corpus or a checkpoint.
        reading: number of ranks that share the bandwidth of the file system.
        stuck: a rank that reads nothing.
    """
    sizes = [piece.size for piece in pieces]
    totals = [sum(sizes[number] for number in share) for share in assign(sizes, RANKS)]
    speed = min(BYTES_PER_S_OF_A_HOST / min(reading, RANKS_OF_A_HOST), BYTES_PER_S_OF_ALL / reading)
    speeds = [0.0 if rank == stuck else speed for rank in range(RANKS)]
    return SimulatedCheck(totals, speeds, totals.index(min(totals))).run()


@pytest.fixture(scope="module")
def two_terabytes(corpus_dir, tmp_path_factory) -> Path:
    """A corpus of 1e12 tokens in a sparse file, with hashes that are not checked."""
    path = Path(shutil.copytree(corpus_dir, tmp_path_factory.mktemp("large") / "corpus"))
    write_index(path / "train", np.dtype("<u2"), np.full(1000, 10**9, np.int32))
    with (path / "train.bin").open("wb") as stream:
        stream.truncate(2 * 10**12)
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["splits"]["train"]["tokens"] = 10**12
    manifest["files"] = {name: {"bytes": (path / name).stat().st_size, "sha256": "0" * 64} for name in FILES}
    manifest["blocks"] = {"bytes": BLOCK_BYTES, "sha256": {"train.bin": ["0" * 64] * -(-2 * 10**12 // BLOCK_BYTES)}}
    (path / MANIFEST).write_text(json.dumps(manifest))
    return path


def test_512_ranks_verify_two_terabytes_within_the_watchdog_timeout(two_terabytes):
    """Simulated with an assumed bandwidth of the file system."""
    pieces = Corpus.open(two_terabytes).pieces()
    assert sum(piece.size for piece in pieces) > 2e12
    assert 80 < simulate(pieces) < TIMEOUT_S / 8, "well within the timeout"
    slowest = min(BYTES_PER_S_OF_A_HOST / RANKS_OF_A_HOST, BYTES_PER_S_OF_ALL / RANKS)
    assert max(piece.size for piece in pieces) / slowest < TIMEOUT_S / 100, "one piece takes too long"


def test_rank_0_alone_exceeds_the_timeout_and_a_file_without_blocks_reports_progress(two_terabytes):
    """If rank 0 alone verified, the other ranks would see no progress until the end."""
    corpus = Corpus.open(two_terabytes)
    assert sum(piece.size for piece in corpus.pieces()) / BYTES_PER_S_OF_A_HOST > TIMEOUT_S
    del corpus.manifest["blocks"]  # as in older corpora
    assert simulate(corpus.pieces(), reading=1) > TIMEOUT_S, "no watchdog kills a rank"


def test_rank_without_progress_ends_the_verification(two_terabytes):
    with pytest.raises(TimeoutError, match="the watchdog kills the rank"):
        simulate(Corpus.open(two_terabytes).pieces(), stuck=77)


def test_512_ranks_verify_a_checkpoint_of_over_a_terabyte_within_the_watchdog_timeout():
    """1.2 TB: dense state, experts, moments and random state of each rank."""
    sizes = [size for _ in range(RANKS) for size in (900_000_000, 1_100_000_000, 344_000_000, 16_000)]
    files = {f"shard_{number:05d}": {"bytes": size, "sha256": "0" * 64} for number, size in enumerate(sizes)}
    assert 1.19e12 < sum(sizes) < 1.21e12
    assert 48 < simulate(pieces_of(Path("nowhere"), files)) < TIMEOUT_S / 8
    assert sum(sizes) / BYTES_PER_S_OF_A_HOST > TIMEOUT_S, "rank 0 alone would exceed the timeout"


@pytest.fixture
def copied(corpus_dir, tmp_path) -> Path:
    """A corpus of many blocks without a verification record."""
    ignored = shutil.ignore_patterns(verification._STAMP)
    path = Path(shutil.copytree(corpus_dir, tmp_path / "copied", ignore=ignored))
    in_blocks(path)
    return path


def verify_and_count(path: str, folder: str, mode: str = "once") -> dict[str, Any]:
    """Bytes of a corpus that this rank reads, and the number of its progress messages or its error."""
    read = 0
    heard: list[str] = []

    class Counting(Checking):
        def __init__(self, pieces: list[Piece]) -> None:
            nonlocal read
            super().__init__(pieces)
            read += self.total

    corpus = Corpus.open(path)
    rank = dist.get_rank()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verification, "Checking", Counting)
        try:
            verify_corpora([corpus, corpus], mode, Path(folder), gather_ranks, rank, heard.append)
        except UserError as error:
            return {"error": str(error), "read": read}
    return {"read": read, "heard": len(heard)}


def size_of(corpus: Path) -> int:
    return sum((corpus / name).stat().st_size for name in FILES)


def test_ranks_share_a_corpus_and_verify_it_once(two_ranks, copied, tmp_path):
    total = size_of(copied)
    reads = [found["read"] for found in two_ranks.run(verify_and_count, str(copied), str(tmp_path))]
    assert sum(reads) == total, "each byte is read once, although the blend names the corpus twice"
    assert max(reads) < 0.6 * total
    again = two_ranks.run(verify_and_count, str(copied), str(tmp_path))
    assert [found["read"] for found in again] == [0, 0]
    for mode, read in (("always", total), ("never", 0)):
        found = two_ranks.run(verify_and_count, str(copied), str(tmp_path), mode)
        assert sum(rank["read"] for rank in found) == read


@pytest.mark.parametrize("writable", [True, False])
def test_hosts_with_separate_copies_verify_their_own_copies_once(two_ranks, copied, tmp_path, writable):
    copies = [Path(shutil.copytree(copied, tmp_path / f"host_{rank}" / "corpus")) for rank in range(2)]
    if not writable:  # this also stops root
        for copy in copies:
            (copy / verification._STAMP).mkdir()
    for read in (size_of(copied), 0):
        found = two_ranks.run(verify_copy, str(tmp_path / "host_{}" / "corpus"), str(tmp_path / "verified"))
        assert [rank["read"] for rank in found] == [read] * 2
        assert [rank["printed"] for rank in found] == ["", ""]


def verify_copy(path: str, folder: str, mode: str = "once") -> dict[str, Any]:
    """Like :func:`verify_and_count` on a host of its own, whose copy has the path of the others'."""
    rank = dist.get_rank()
    printed = io.StringIO()
    own = Path(path.format(rank))
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(verification.socket, "gethostname", lambda: f"host{rank}")
        patch.setattr(Path, "resolve", lambda path: Path("/corpus") if path == own else path)
        return {**verify_and_count(str(own), folder, mode), "printed": printed.getvalue()}


def test_hosts_with_other_copies_are_refused_in_one_line(two_ranks, copied, tmp_path):
    for rank in range(2):
        shutil.copytree(copied, tmp_path / f"host_{rank}" / "corpus")
    edit_manifest(tmp_path / "host_1" / "corpus", lambda m: m["files"]["train.bin"].update(sha256="0" * 64))
    for mode in ("once", "never"):
        found = two_ranks.run(verify_copy, str(tmp_path / "host_{}" / "corpus"), str(tmp_path), mode)
        for rank in found:
            assert re.fullmatch(
                r"data\.dirs: .*corpus is another corpus on host1 than on host0; copy one to both", rank["error"]
            )


def test_f10_corruption_found_by_one_rank_ends_all_ranks_with_one_line(two_ranks, copied, tmp_path):
    content = bytearray((copied / "train.bin").read_bytes())
    content[-1] ^= 1
    (copied / "train.bin").write_bytes(content)
    first, second = (found["error"] for found in two_ranks.run(verify_and_count, str(copied), str(tmp_path)))
    assert first == second
    assert first.startswith(f"{copied}/train.bin is damaged: its SHA-256 from byte ")
    assert "\n" not in first
    assert not list(copied.glob(verification._STAMP)), "a corrupt corpus has a verification record"


def rewritten(path: Path) -> None:
    path.write_bytes(path.read_bytes())


def replaced_with_its_times(path: Path) -> None:
    """Like a copying tool that preserves times."""
    shutil.copy2(path, path.with_name("new"))
    path.with_name("new").rename(path)


def with_another_entry(manifest: Path) -> None:
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"another": 1}))


CHANGES = {
    "written again": ("train.bin", rewritten),
    "replaced with its times": ("validation.bin", replaced_with_its_times),
    "another manifest": (MANIFEST, with_another_entry),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("writable", [True, False])
def test_changed_corpus_is_verified_again_with_a_message(copied, tmp_path, capsys, change, writable):
    name, alter = CHANGES[change]
    if not writable:  # this also stops root
        (copied / verification._STAMP).mkdir()
    verify = partial(verify_corpora, directory=tmp_path / "verified")
    verify([Corpus.open(copied)], "once")
    assert (tmp_path / "verified").exists() is not writable
    assert capsys.readouterr().out == ""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Piece, "check", None)  # fails if a piece is verified
        verify([Corpus.open(copied)], "once")
    alter(copied / name)
    verify([Corpus.open(copied)], "once")
    assert capsys.readouterr().out == f"{copied / name} has changed since it was verified; verifying it again\n"
    verify([Corpus.open(copied)], "once")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"train.bin": [1, 2, 3]}', "[" * 10**5])
def test_f10_corrupt_verification_record_is_ignored(copied, content):
    (copied / verification._STAMP).write_text(content)
    (copied / "train.bin").write_bytes(bytes((copied / "train.bin").stat().st_size))
    with pytest.raises(UserError, match=r"train\.bin is damaged"):
        verify_corpora([Corpus.open(copied)], "once")


def test_progress_of_a_verification_is_printed(monkeypatch, capsys):
    monkeypatch.setattr(verification, "_PRINT_EVERY_S", -1.0)
    SimulatedCheck([10 * 10**9, 20 * 10**9], [1e9, 1e9], rank=0).run()
    lines = capsys.readouterr().out.splitlines()
    assert [line.rpartition(",")[0] for line in lines[:3]] == [
        f"verifying the data: {gigabytes} of 30.0 GB" for gigabytes in ("10.0", "20.0", "25.0")
    ]


def newest_and_files_read(root: str) -> tuple[int | None, list[str], list[str]]:
    """The chosen checkpoint, the files that this rank opens for it, and its progress messages."""
    opened: list[str] = []
    heard: list[str] = []
    real = Path.open

    def counting(path: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if path.suffix == ".safetensors":
            opened.append(path.name)
        return real(path, mode, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "open", counting)
        checkpoint = CheckpointStore(Path(root), keep=2).newest(heard.append)
    return None if checkpoint is None else checkpoint.step, opened, heard


def test_ranks_share_the_files_of_a_checkpoint(two_ranks, undisturbed):
    """Each file is read once, by one rank."""
    (step, first, _), (_, second, _) = two_ranks.run(newest_and_files_read, str(undisturbed[0] / "checkpoints"))
    assert step == 40
    files = sorted(path.name for path in (undisturbed[0] / "checkpoints" / "step_00000040").glob("*.safetensors"))
    assert sorted(first + second) == files
    assert first
    assert second
