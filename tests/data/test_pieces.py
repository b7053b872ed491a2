"""Files that are checked in parts: every byte once, whoever takes which part, and what is wrong by name."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynmoe.data.corpus import MANIFEST, Corpus, describe_files
from dynmoe.data.pieces import Checking, Piece, TokenIds, assign, first_problem
from dynmoe.errors import UserError

BLOCK = 1000  # not a multiple of what is read at a time, and the last block is shorter


def in_blocks(corpus: Path) -> dict:
    """Gives the manifest of a corpus hashes of small blocks."""
    manifest = json.loads((corpus / MANIFEST).read_text()) | describe_files(corpus, BLOCK)
    (corpus / MANIFEST).write_text(json.dumps(manifest))
    return manifest


@pytest.fixture
def copied(corpus_dir, tmp_path) -> Path:
    return Path(shutil.copytree(corpus_dir, tmp_path / "copied"))


def test_a_manifest_has_the_hashes_of_files_and_of_their_blocks(copied):
    before = Corpus.open(copied).fingerprint
    manifest = in_blocks(copied)
    for name, facts in manifest["files"].items():
        content = (copied / name).read_bytes()
        assert facts == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        blocks = [content[start : start + BLOCK] for start in range(0, len(content), BLOCK)]
        hashes = [hashlib.sha256(block).hexdigest() for block in blocks]
        assert manifest["blocks"]["sha256"].get(name) == (hashes if len(blocks) > 1 else None)
    assert len(manifest["blocks"]["sha256"]["train.bin"]) > 3
    assert Corpus.open(copied).fingerprint == before, "a run resumes with a corpus that was prepared again"


def test_the_pieces_of_a_corpus_are_all_of_its_bytes(corpus_dir, copied):
    in_blocks(copied)
    for path, count in ((corpus_dir, 5), (copied, 20)):
        corpus = Corpus.open(path)
        bytes_of = {name: bytearray() for name in corpus.manifest["files"]}
        for piece in corpus.pieces():
            own = bytes_of[piece.path.name]
            assert piece.start == len(own)
            own += piece.path.read_bytes()[piece.start : piece.start + piece.size]
        assert {name: bytes(own) for name, own in bytes_of.items()} == {n: (path / n).read_bytes() for n in bytes_of}
        assert len(corpus.pieces()) >= count
        corpus.verify()


@pytest.mark.parametrize("block", [0, 2, -1])
def test_a_block_that_differs_is_named_by_its_bytes(copied, block):
    manifest = in_blocks(copied)
    size = manifest["files"]["train.bin"]["bytes"]
    start = range(0, size, BLOCK)[block]
    content = bytearray((copied / "train.bin").read_bytes())
    content[start] ^= 1
    (copied / "train.bin").write_bytes(content)
    where = rf"its SHA-256 from byte {start} to {min(start + BLOCK, size)} is not the manifest's; prepare the corpus"
    with pytest.raises(UserError, match=rf"train\.bin is damaged: {where} again"):
        Corpus.open(copied).verify()


@pytest.mark.parametrize(
    "change",
    [
        lambda blocks: blocks.update(bytes=0),
        lambda blocks: blocks.update(bytes=1001),
        lambda blocks: blocks.update(bytes="1000"),
        lambda blocks: blocks.pop("sha256"),
        lambda blocks: blocks["sha256"]["train.bin"].pop(),
        lambda blocks: blocks["sha256"].update(elsewhere=["x"]),
        lambda blocks: blocks["sha256"]["train.bin"].__setitem__(0, 7),
    ],
)
def test_blocks_that_do_not_cover_their_files_are_refused(copied, change):
    manifest = in_blocks(copied)
    change(manifest["blocks"])
    (copied / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="is not a manifest of format 1"):
        Corpus.open(copied)


@pytest.mark.parametrize("dtype", ["u1", "<u2", "<i2", "<i4", "<i8"])
@pytest.mark.parametrize("wrong", ["largest", 90, -1])
def test_every_number_of_a_file_is_a_token(tmp_path, dtype, wrong):
    tokens = (np.arange(5_000_000) % 90).astype(dtype)  # more than is read at a time
    place = 4_800_001
    tokens[place] = 89 if wrong == "largest" else np.array(wrong).astype(dtype)
    path = tmp_path / "train.bin"
    tokens.tofile(path)
    size = path.stat().st_size
    sha256 = hashlib.sha256(tokens.tobytes()).hexdigest()
    half = size // 2
    pieces = [
        Piece(path, "train.bin", start, half, size, hashlib.sha256(tokens.tobytes()[start : start + half]).hexdigest(),
              TokenIds(np.dtype(dtype), 90))
        for start in (0, half)
    ]  # fmt: skip
    problem = f"train.bin: token {tokens[place]} at position {place} is outside the vocabulary of 90"
    assert first_problem(pieces) == (None if wrong == "largest" else problem)
    assert first_problem([Piece(path, "train.bin", 0, size, size, sha256, TokenIds(np.dtype(dtype), 90))]) == (
        None if wrong == "largest" else problem
    )


def test_the_first_damaged_file_is_told_however_fast_another_is_found(tmp_path):
    pieces = []
    for number in range(40):
        path = tmp_path / f"{number}"
        content = b"x" * (1 << 24 if number == 5 else 1)
        path.write_bytes(content)
        right = hashlib.sha256(b"y" if number == 5 else content).hexdigest()
        pieces.append(Piece(path, path.name, 0, len(content), len(content), right))
    (tmp_path / "7").unlink()
    for _ in range(5):
        assert first_problem(pieces) == "5 is damaged: its SHA-256 is not the manifest's"
    assert first_problem(pieces[6:]) == "7 is missing"
    (tmp_path / "7").write_bytes(b"xx")
    assert first_problem(pieces[6:]) == "7 is damaged: it has 2 bytes instead of 1"


def test_a_check_that_is_stopped_reads_no_further(tmp_path):
    with (tmp_path / "large").open("wb") as stream:
        stream.truncate(1 << 40)
    checking = Checking([Piece(tmp_path / "large", "large", 0, 1 << 40, 1 << 40, "")])
    assert not checking.wait(0.05)
    checking.stop()
    assert checking.wait(5.0)
    assert 0 < checking.done < 1 << 40
    assert (checking.place, checking.problem) == ("large", None)


@given(st.lists(st.integers(0, 50), max_size=60), st.integers(1, 20))
def test_shares_are_even(sizes, ranks):
    shares = assign(sizes, ranks)
    assert sorted(number for share in shares for number in share) == list(range(len(sizes)))
    loads = [sum(sizes[number] for number in share) for share in shares]
    assert max(loads) <= sum(sizes) / ranks + max(sizes, default=0)
    if len(sizes) <= ranks:
        assert all(len(share) <= 1 or sum(sizes[n] for n in share) == max(sizes[n] for n in share) for share in shares)
