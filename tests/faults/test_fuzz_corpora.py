"""Fuzzing for F10: a corpus has the tokens that were prepared, or it is refused in one line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.encode import Part
from data_prep.tiktoken_files import PATTERNS, read_tokenizer
from dynmoe.data.corpus import MANIFEST, TOKEN_FILES, Corpus
from dynmoe.data.indexed import IndexedTokens, check_indexed, write_index
from dynmoe.data.sentencepiece_tokenizer import TOKENIZER_MODEL
from dynmoe.data.tokenizer import Tokenizer
from dynmoe.data.tokenizer_files import open_tokenizer
from dynmoe.data.validation import validation_shares
from dynmoe.train.summary import validation_unigram_entropy
from tests.data import languages
from tests.data.languages import save, save_ranks
from tests.faults.hostile import JSON, attempt, damaged, fuzz

FILES = (TOKENIZER_MODEL, *TOKEN_FILES)


@pytest.fixture(scope="module")
def sound(corpus_dir) -> dict[str, bytes]:
    """The files of a corpus."""
    return {path.name: path.read_bytes() for path in corpus_dir.iterdir()}


@st.composite
def damaged_manifest(draw: st.DrawFn, content: bytes) -> bytes:
    """A manifest with entries removed, renamed or replaced."""
    manifest = json.loads(content)
    for _ in range(draw(st.integers(1, 3))):
        entry: Any = manifest
        while isinstance(entry, dict) and entry:
            key = draw(st.sampled_from(sorted(entry)))
            if not isinstance(entry[key], dict) or draw(st.integers(0, 2)) == 0:
                action = draw(st.sampled_from(("remove", "rename", "replace")))
                value = entry.pop(key)
                if action == "rename":
                    entry[draw(st.sampled_from((*FILES, "../x", "a\nb")) | st.text(max_size=5))] = value
                elif action == "replace":
                    entry[key] = draw(JSON)
                break
            entry = entry[key]
    return json.dumps(manifest).encode()


def open_written(folder: Path, content: dict[str, bytes]) -> Corpus | None:
    """The corpus read from these files; None if it is refused."""
    for name, own in content.items():
        (folder / name).write_bytes(own)

    def open_and_verify() -> Corpus:
        corpus = Corpus.open(folder)
        corpus.verify()
        return corpus

    return attempt(open_and_verify)


@fuzz(75)
@given(data=st.data())
def test_f10_fuzz_corpus_files(tmp_path, sound, data):
    """A corpus that passes the verification has the bytes that were prepared."""
    content = dict(sound)
    for name in data.draw(st.lists(st.sampled_from(sorted(sound)), min_size=1, max_size=2)):
        others = st.sampled_from(sorted(sound)).map(sound.__getitem__)
        content[name] = data.draw(damaged(content[name]) | others)
    if open_written(tmp_path, content) is not None:
        assert {name: content[name] for name in FILES} == {name: sound[name] for name in FILES}


@fuzz(75)
@given(data=st.data())
def test_f10_fuzz_corpus_manifests(tmp_path, sound, data):
    """An accepted manifest has all entries that are used, including those used only at the end of training."""
    corpus = open_written(tmp_path, {**sound, MANIFEST: data.draw(damaged_manifest(sound[MANIFEST]))})
    if corpus is not None:
        assert len(corpus.fingerprint) == 64
        assert math.isfinite(validation_unigram_entropy([corpus], validation_shares([corpus])))


@fuzz(75)
@given(data=st.data())
def test_f10_fuzz_parts_of_an_interrupted_build(tmp_path, data):
    """A part from which a build resumes has the written content."""
    path = tmp_path / "00000000.npz"
    part = Part(
        np.arange(30, dtype=np.int32), np.array([10, 20], np.int32), np.array([7, 9]), np.ones((2, 2), np.uint64),
        np.array([True, False]), np.array([0, 2]), 3, [["empty", 1]], "0" * 64,
    )  # fmt: skip
    part.write(path)
    path.write_bytes(data.draw(damaged(path.read_bytes())))
    read = attempt(lambda: Part.read(path))
    if read is not None:
        assert repr(read) == repr(part)


@st.composite
def indexed(draw: st.DrawFn) -> tuple[np.ndarray, list[int], list[int]]:
    """Tokens, lengths of the sequences, and document boundaries."""
    dtype = np.dtype(draw(st.sampled_from(("uint8", "<i2", "<i4", "<i8", "<u2"))))
    lengths = draw(st.lists(st.integers(0, 6), max_size=6))
    bounds = np.iinfo(dtype)
    tokens = draw(st.lists(st.integers(0, 9) | st.integers(int(bounds.min), int(bounds.max)), min_size=sum(lengths),
                           max_size=sum(lengths)))  # fmt: skip
    inner = draw(st.lists(st.integers(0, len(lengths)), max_size=3)) if lengths else []
    return np.array(tokens, dtype), lengths, sorted([0, *inner, len(lengths)])


@st.composite
def damaged_index(draw: st.DrawFn, content: bytes) -> bytes:
    """An index file with one number replaced."""
    width = draw(st.sampled_from((1, 4, 8)))
    place = draw(st.integers(9, max(9, len(content) - width)))
    number = draw(st.integers(-2, 40) | st.integers(-(2**63), 2**63 - 1)) % 256**width
    return content[:place] + number.to_bytes(width, "little") + content[place + width :]


@fuzz(100)
@given(pair=indexed(), data=st.data())
def test_f10_fuzz_megatron_indexed_files(tmp_path, pair, data):
    """Without hashes: an accepted file is read by Megatron in the same way and within its bounds."""
    from tests.data.megatron_order import IndexedDatasetBuilder  # noqa: F401  (suppresses warnings of Megatron's import)

    tokens, lengths, boundaries = pair
    prefix = tmp_path / "train"
    write_index(prefix, tokens.dtype, np.array(lengths, np.int32), np.array(boundaries, np.int64))
    content = {".idx": prefix.with_suffix(".idx").read_bytes(), ".bin": tokens.tobytes()}
    harm = data.draw(st.sampled_from(("none", ".idx", ".bin", "number")))
    if harm in content:
        content[harm] = data.draw(damaged(content[harm]))
    elif harm == "number":
        content[".idx"] = data.draw(damaged_index(content[".idx"]))
    for ending, own in content.items():
        prefix.with_suffix(ending).write_bytes(own)
    found = attempt(lambda: check_indexed(prefix))
    if harm == "none":
        assert found is not None
        assert (found.lengths.tolist(), found.boundaries.tolist()) == (lengths, boundaries)
    if found is not None:
        is_what_megatron_reads(found, content[".bin"])


def is_what_megatron_reads(found: IndexedTokens, content: bytes) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    stored = np.frombuffer(content, found.dtype)
    assert found.num_tokens == len(stored)
    if len(stored):
        dataset = IndexedDataset(str(found.prefix))
        assert dataset.sequence_lengths.tolist() == found.lengths.tolist()
        assert dataset.document_indices.tolist() == found.boundaries.tolist()
        assert np.array_equal(np.concatenate([dataset[number] for number in range(len(dataset))]), stored)
    counts = attempt(lambda: found.counts(10))
    if counts is None:
        assert ((stored < 0) | (stored >= 10)).any()
    else:
        assert counts.tolist() == [int((stored == token).sum()) for token in range(10)]


@fuzz(100)
@given(data=st.data())
def test_f10_fuzz_tokenizer_files(tmp_path, sound, data):
    """An accepted tokenizer can encode, with all ids in its vocabulary."""
    (tmp_path / "tokenizer.model").write_bytes(data.draw(damaged(sound["tokenizer.model"]) | st.binary(max_size=60)))
    tokenizer = attempt(lambda: open_tokenizer(tmp_path / "tokenizer.model"))
    if tokenizer is not None:
        encodes(tokenizer)


@pytest.fixture(scope="module")
def others(tmp_path_factory) -> list[Path]:
    """A tokenizer.json of each kind."""
    folder = tmp_path_factory.mktemp("kinds")
    kinds = ("olmoe", "llama3", "llama2", "unigram")
    return [save(getattr(languages, name)(), folder / name) / "tokenizer.json" for name in kinds]


@fuzz(150)
@given(data=st.data())
def test_f10_fuzz_tokenizers_of_hugging_face(tmp_path, others, data):
    """Whole fields are removed, renamed and replaced, or bytes."""
    content = data.draw(st.sampled_from(others)).read_bytes()
    path = tmp_path / "tokenizer.json"
    path.write_bytes(data.draw(damaged_manifest(content) | damaged(content) | st.just(content)))
    special = data.draw(st.booleans())
    attempt(lambda: encodes(open_tokenizer(path, special_tokens=special)))


@fuzz(100)
@given(data=st.data())
def test_f10_fuzz_tiktoken_files(tmp_path, data):
    path = save_ranks({bytes([byte]): byte for byte in range(256)} | {b"ab": 256, b"abc": 257}, tmp_path / "a.tiktoken")
    path.write_bytes(data.draw(damaged(path.read_bytes(), (b"\n", b" 1\n", b"=")) | st.binary(max_size=60)))
    pattern = data.draw(st.sampled_from(sorted(PATTERNS)) | st.text(max_size=9))
    attempt(lambda: encodes(read_tokenizer(str(path), pattern=pattern)))


def encodes(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("The router takes 12 of the gates.\n\n  ünïcode 漢字 🙂")
    assert all(0 <= token < tokenizer.vocab_size for token in [*tokens, tokenizer.eod])
    assert isinstance(tokenizer.decode(tokens), str)
    assert isinstance(tokenizer.splits_into_words, bool)
    assert all(isinstance(tokenizer.piece(token), str) for token in range(min(1000, tokenizer.vocab_size)))
