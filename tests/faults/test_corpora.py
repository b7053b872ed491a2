"""F10, F11 and F24: corrupt corpora, corpora that are too small to train on, and index files with code."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.build import build
from data_prep.recipe import Recipe
from dynmoe.config import DataConfig, load_config
from dynmoe.data.batches import PretrainingData
from dynmoe.data.corpus import MANIFEST, Corpus, describe_files, open_corpora
from dynmoe.data.indexed import write_index
from dynmoe.errors import UserError
from tests.texts import write_texts
from tests.train.cases import tiny

ROOT = Path(__file__).parents[2]
LENGTHS = 34  # offset of the sequence lengths in an index file


@pytest.fixture
def prepared(corpus_dir, tmp_path) -> Path:
    """A copy of the corpus without a verification record."""
    ignored = shutil.ignore_patterns(".verified.json")
    return Path(shutil.copytree(corpus_dir, tmp_path / "prepared", ignore=ignored))


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 0x40
    path.write_bytes(content)


def store(corpus: Path, split: str, tokens: list[int], dtype: str = "<u2") -> None:
    """Replaces a split by one document with these tokens, and updates the manifest."""
    np.array(tokens, dtype).tofile(corpus / f"{split}.bin")
    write_index(corpus / split, np.dtype(dtype), np.array([len(tokens)] if tokens else [], np.int32))
    edit_manifest(corpus, lambda manifest: manifest["splits"][split].update(tokens=len(tokens)))
    edit_manifest(corpus, lambda manifest: manifest.update(describe_files(corpus)))


def edit_manifest(corpus: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((corpus / MANIFEST).read_text())
    change(manifest)
    (corpus / MANIFEST).write_text(json.dumps(manifest))


def without(*path: str) -> Callable[[Path], None]:
    """A function that removes an entry from the manifest."""

    def take_out(manifest: dict[str, Any]) -> None:
        del reduce(getitem, path[:-1], manifest)[path[-1]]

    return lambda corpus: edit_manifest(corpus, take_out)


def longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0\0")


# Corruption of a corpus, the file that the error must name, and a part of the message.
DAMAGE: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "a flipped token": (lambda corpus: flip(corpus / "train.bin", 100), "train.bin", "SHA-256"),
    "a .bin cut short": (lambda corpus: os.truncate(corpus / "train.bin", 50), "train.bin", "but its index requires"),
    "a longer .bin": (lambda corpus: longer(corpus / "train.bin"), "train.bin", "but its index requires"),
    "a missing .bin": (lambda corpus: (corpus / "train.bin").unlink(), "train.bin", "No such file"),
    "wrong magic": (lambda corpus: flip(corpus / "train.idx", 0), "train.idx", "not a Megatron index"),
    "an unknown type": (lambda corpus: flip(corpus / "train.idx", 17), "train.idx", "type code"),
    "an .idx cut short": (lambda corpus: os.truncate(corpus / "train.idx", 90), "train.idx", "but its counts require"),
    "a longer .idx": (lambda corpus: longer(corpus / "train.idx"), "train.idx", "but its counts require"),
    "an empty .idx": (lambda corpus: os.truncate(corpus / "train.idx", 0), "train.idx", "less than its header"),
    "a wrong length": (lambda corpus: flip(corpus / "train.idx", LENGTHS), "train.idx", "pointers"),
    "a negative length": (lambda corpus: set_length(corpus, -1), "train.idx", "negative length"),
    "a wrong pointer": (lambda corpus: flip(corpus / "train.idx", pointers(corpus) + 8), "train.idx", "pointers"),
    "a wrong document": (lambda corpus: flip(corpus / "train.idx", -3), "train.idx", "document boundaries"),
    "an id beyond the vocabulary": (
        lambda corpus: store(corpus, "train", [5, 6, 400, 7] * 20), "train.bin",
        "token 400 at position 2 is outside the vocabulary of 400",
    ),
    "a negative id": (lambda corpus: store(corpus, "train", [5, -1] * 40, "<i4"), "train.bin", "token -1 at position"),
    "another split": (
        lambda corpus: [shutil.copy(corpus / f"validation.{end}", corpus / f"train.{end}") for end in ("bin", "idx")],
        "train.bin", "its size differs from",
    ),
    "a manifest cut short": (lambda corpus: os.truncate(corpus / MANIFEST, 100), MANIFEST, "cannot be read"),
    "a manifest of brackets": (lambda corpus: (corpus / MANIFEST).write_text("[" * 10**5), MANIFEST, "cannot be read"),
    "an empty manifest": (lambda corpus: (corpus / MANIFEST).write_text("[]"), MANIFEST, "not a manifest of format 1"),
    "a manifest of fewer files": (without("files", "train.bin"), MANIFEST, "not a manifest of format 1"),
    "a manifest without a hash": (without("files", "train.bin", "sha256"), MANIFEST, "not a manifest of format 1"),
    "a manifest without a tokenizer": (without("tokenizer", "sha256"), MANIFEST, "not a manifest of format 1"),
    "a manifest without what the summary tells": (
        without("splits", "validation", "unigram_entropy_nats"), MANIFEST, "not a manifest of format 1",
    ),
    "a manifest of other tokens": (
        lambda corpus: edit_manifest(corpus, lambda manifest: manifest["splits"]["train"].update(tokens=7)),
        "train.idx", "its token count differs from the manifest",
    ),
    "no tokenizer": (lambda corpus: (corpus / "tokenizer.model").unlink(), "tokenizer.model", "No such file"),
    "a tokenizer of garbage": (
        lambda corpus: (corpus / "tokenizer.model").write_bytes(b"x"), "tokenizer.model", "not a sentencepiece model",
    ),
}  # fmt: skip


def pointers(corpus: Path) -> int:
    """Offset of the pointers in the index file of the training split."""
    return LENGTHS + 4 * len(Corpus.open(corpus).splits["train"].lengths)


def set_length(corpus: Path, length: int) -> None:
    content = bytearray((corpus / "train.idx").read_bytes())
    content[LENGTHS : LENGTHS + 4] = length.to_bytes(4, "little", signed=True)
    (corpus / "train.idx").write_bytes(content)


@pytest.mark.parametrize("damage", sorted(DAMAGE))
def test_f10_corrupt_corpus_file_is_found_and_named(prepared, damage):
    harm, named, problem = DAMAGE[damage]
    harm(prepared)
    with pytest.raises(UserError, match=problem) as caught:
        Corpus.open(prepared).verify()
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_f10_token_outside_the_vocabulary_is_found_without_hashes(corpus_dir):
    with pytest.raises(UserError, match="outside the vocabulary of 300"):
        Corpus.open(corpus_dir).splits["train"].counts(300)


@pytest.mark.parametrize("damage", ["a wrong pointer", "an id beyond the vocabulary"])
def test_f10_corrupt_corpus_is_refused_before_a_process_group_exists(prepared, tmp_path, damage):
    harm, named, _ = DAMAGE[damage]
    harm(prepared)
    code = (
        "import runpy, torch.distributed\n"
        "try: runpy.run_path('train.py', run_name='__main__')\n"
        "finally: print('process group:', torch.distributed.is_initialized())"
    )
    arguments = [*tiny(prepared, tmp_path / "runs"), "parallel.expert=1"]
    failed = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False, cwd=ROOT, timeout=120,
    )  # fmt: skip
    assert (failed.returncode, failed.stdout) == (2, "process group: False\n"), failed.stderr
    assert [named in line for line in failed.stderr.splitlines() if line.startswith("error: ")] == [True]
    assert not list(tmp_path.rglob("metrics.jsonl"))


class Mark:
    """Its pickle creates a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_f24_megatron_index_file_with_code_is_not_executed(corpus_dir, tmp_path):
    def open_data() -> PretrainingData:
        return PretrainingData(
            open_corpora([str(corpus_dir)], 32), DataConfig(sequence_length=32), 0, tmp_path / "cache"
        )

    open_data().train_batch(range(2))
    mark = tmp_path / "executed"
    files = sorted((tmp_path / "cache").glob("*.npy"))
    assert len(files) >= 3
    for path in files:
        path.write_bytes(pickle.dumps(Mark(mark)))
        with pytest.raises(UserError, match="is not an array of numbers"):
            open_data().train_batch(range(2))
        assert not mark.exists()
        path.unlink()
        open_data().train_batch(range(2))  # which builds the file again
    pickle.loads(pickle.dumps(Mark(mark)))
    assert mark.exists()  # the pickle does execute code


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize(("tokens", "problem"), [([], "has 0"), ([5] * 32, "has 32")])
def test_f11_corpus_shorter_than_one_sequence_is_a_configuration_error(prepared, split, tokens, problem):
    store(prepared, split, tokens)
    with pytest.raises(UserError, match=rf"data\.sequence_length=32: .* {problem} {split} tokens") as caught:
        open_corpora([str(prepared)], 32)
    assert "\n" not in str(caught.value)


def test_f11_corpus_of_one_sequence_is_accepted(prepared, tmp_path):
    tokens = list(range(5, 38))
    store(prepared, "train", tokens)
    data = PretrainingData(open_corpora([str(prepared)], 32), DataConfig(sequence_length=32), 0, tmp_path / "cache")
    batch = data.train_batch(range(1))
    assert data.samples_per_epoch == 1
    assert [*batch.tokens_BS[0].tolist(), batch.labels_BS[0, -1].item()] == tokens


@pytest.mark.parametrize(
    ("weights", "problem"),
    [
        ("[0]", "data.weights=0.0: is too small"),
        ("[-1]", "data.weights=-1.0: is too small"),
        ("[nan]", "data.weights=nan: is not finite"),
        ("[inf]", "data.weights=inf: is not finite"),
        ("[1e-320]", "data.weights=1e-320: is too small"),
        ("[1e308]", "data.weights=1e+308: is too large"),
        ("[1,2]", "data.weights=[1.0, 2.0]: must have one weight for each of data.dirs"),
        ("[[1]]", "data.weights=['1']: is nested in a list"),
        ("[none]", "data.weights[0] in the command line: Value 'none'"),
        ("[]", None),
    ],
)
def test_f11_invalid_blend_weights_are_refused(weights, problem):
    if problem is None:
        assert load_config(None, [f"data.weights={weights}"]).data.weights == []
        return
    with pytest.raises(UserError) as caught:
        load_config(None, [f"data.weights={weights}"])
    assert str(caught.value).startswith(problem)
    assert "\n" not in str(caught.value)


def test_f11_blend_with_a_corpus_shorter_than_one_sequence_is_refused(corpus_dir, prepared, tmp_path):
    store(prepared, "train", [5] * 33)
    corpora = open_corpora([str(corpus_dir), str(prepared)], 32)
    dirs = [str(corpus_dir), str(prepared)]
    data = PretrainingData(corpora, DataConfig(dirs, [1e-9, 1e9], 32), 0, tmp_path / "cache")
    assert data._weighted_epoch_size == 1
    none = PretrainingData(corpora, DataConfig(dirs, [1, 1 - 1e-9], 64), 0, tmp_path / "cache")
    with pytest.raises(UserError, match=r"data\.weights: an epoch of this blend holds no sequence"):
        _ = none.samples_per_epoch


def test_f11_sources_without_a_document_are_refused(tmp_path):
    (tmp_path / "nothing").mkdir()
    (tmp_path / "blank").mkdir()
    (tmp_path / "blank" / "a.txt").write_text(" \n")
    write_texts(tmp_path / "one", documents=1)
    problems = {
        "nothing": "contains no file",
        "blank": r"blank: gave no text; skipped: empty 1 \(a\.txt\)",
        "one": "one: gave no (train|validation) document",
    }
    for name, problem in problems.items():
        with pytest.raises(UserError, match=problem) as caught:
            build(Recipe([str(tmp_path / name)], vocab_size=300), tmp_path / f"{name}-out", workers=1)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / f"{name}-out").exists()
