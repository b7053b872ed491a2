from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import zstandard
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from data_prep.build import build, is_current
from data_prep.recipe import Recipe
from data_prep.sources import STDLIB, RefusedError, list_units, read_unit, text_of
from data_prep.units import RawDocument
from dynmoe.data.corpus import Corpus
from dynmoe.data.tokenizer_files import open_tokenizer
from dynmoe.errors import UserError
from tests.texts import make_text, write_texts


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def recipe(source: Path, **options) -> Recipe:
    return Recipe([str(source)], **{"vocab_size": 400, "validation_fraction": 0.2, **options})


def read_all(*sources: str) -> list[str]:
    """The texts of all documents, through units."""
    return [text_of(document) for unit in list_units(sources) for document in read_unit(unit, "text")]


def test_the_same_text_gives_the_same_bytes_wherever_it_lies_and_with_any_workers(tmp_path):
    for place in ("here", "there"):
        write_texts(tmp_path / place / "text", documents=40)
    build(recipe(tmp_path / "here" / "text"), tmp_path / "one", workers=1)
    build(recipe(tmp_path / "there" / "text"), tmp_path / "two", workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_every_document_is_there_and_decodes_to_itself(corpus_dir):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    from tests.data.megatron_order import IndexedDatasetBuilder  # noqa: F401  (hushes Megatron's import)

    corpus = Corpus.open(corpus_dir)
    tokenizer = corpus.tokenizer
    texts = set()
    for split in ("train", "validation"):
        dataset = IndexedDataset(str(corpus_dir / split))
        for tokens in (dataset[i].tolist() for i in range(len(dataset))):
            assert tokens[-1] == tokenizer.eod
            texts.add(tokenizer.decode(tokens[:-1]))
    assert texts == {make_text(number) for number in range(60)}
    splits = corpus.manifest["splits"]
    assert splits["train"]["documents"] + splits["validation"]["documents"] == 60
    assert splits["train"]["tokens"] == corpus.splits["train"].num_tokens


@pytest.mark.parametrize(
    "text", ["  indented\n\n\n    more\t\n", "naïve — ünïcode 漢字 🙂", "a\r\nb", "x = 1234567890", " "]
)
def test_the_tokenizer_gives_any_text_back(corpus_dir, text):
    tokenizer = open_tokenizer(corpus_dir / "tokenizer.model")
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_jsonl_in_every_packing_and_broken_lines_by_name(tmp_path):
    good = [json.dumps({"text": make_text(n)}) for n in range(12)]
    bad = [
        "{not json",
        '{"text": "half a pair \\ud800"}',
        "[" * 100_000,
        json.dumps({"body": "no key"}),
        json.dumps({"text": 7}),
        json.dumps({"text": " \n"}),
        "[1]",
    ]
    lines = ("\n".join([*good[:6], *bad, *good[6:]]) + "\n").encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.compress(lines))
    results = []
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst"):
        manifest = build(recipe(tmp_path / name), tmp_path / f"out-{name}", workers=1)
        assert manifest["refused"]["counts"] == {"bad_json": 2, "not_utf8": 1, "missing_key": 3, "empty": 1}
        assert manifest["refused"]["first_names"]["bad_json"] == [f"{name}:7", f"{name}:9"]
        results.append((tmp_path / f"out-{name}" / "train.bin").read_bytes())
    assert results[0] == results[1] == results[2]


def test_lines_are_counted_anew_in_each_file_of_the_same_name(tmp_path):
    for year, bad in (("2023", 2), ("2024", 3)):
        lines = [json.dumps({"text": make_text(n)}) for n in range(6)]
        lines[bad] = "{"
        (tmp_path / year).mkdir()
        (tmp_path / year / "data.jsonl").write_text("\n".join(lines))
    given = [str(tmp_path / year / "data.jsonl") for year in ("2023", "2024")]
    manifest = build(Recipe(given, vocab_size=400, validation_fraction=0.2), tmp_path / "out", workers=1)
    assert manifest["refused"]["first_names"]["bad_json"] == ["data.jsonl:3", "data.jsonl:4"]


@pytest.mark.parametrize(("suffix", "compress"), [(".gz", gzip.compress), (".zst", zstandard.compress)])
def test_a_file_that_is_cut_off_is_named(tmp_path, suffix, compress):
    lines = "".join(json.dumps({"text": make_text(n)}) + "\n" for n in range(50)).encode()
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(compress(lines)[:-200])
    with pytest.raises(UserError, match=rf"a\.jsonl\{suffix}: cannot be read"):
        read_all(str(path))


def test_several_zstandard_frames_are_one_text(tmp_path):
    frames = [zstandard.compress((json.dumps({"text": f"frame {n}"}) + "\n").encode()) for n in range(3)]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(frames))
    assert read_all(str(tmp_path / "a.jsonl.zst")) == ["frame 0", "frame 1", "frame 2"]


def test_a_directory_that_is_no_corpus_is_never_overwritten(tmp_path):
    write_texts(tmp_path / "text", documents=3)
    write_texts(tmp_path / "other", documents=3)
    for out, problem in (("other", "exists and is not a corpus"), ("text/out", "lies inside the source")):
        failed = run(str(tmp_path / "text"), "--out", str(tmp_path / out), "--overwrite")
        assert failed.returncode == 2
        assert problem in failed.stderr
    assert len(list((tmp_path / "text").iterdir())) == len(list((tmp_path / "other").iterdir())) == 3


def test_text_that_is_not_utf8_is_counted(tmp_path):
    write_texts(tmp_path / "text", documents=20)
    (tmp_path / "text" / "latin.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "text" / "nothing.txt").write_bytes(b"")
    manifest = build(recipe(tmp_path / "text"), tmp_path / "out", workers=1)
    assert manifest["refused"]["counts"] == {"not_utf8": 1, "empty": 1}
    assert manifest["refused"]["first_names"] == {"not_utf8": ["latin.txt"], "empty": ["nothing.txt"]}


def test_a_document_without_text_says_why():
    assert text_of(RawDocument(b'{"text": "hi"}', "text")) == "hi"
    with pytest.raises(RefusedError) as caught:
        text_of(RawDocument(b"\xff"))
    assert caught.value.reason == "not_utf8"


def test_the_standard_library_is_real_text_without_tests():
    names = [name for unit in list_units([STDLIB]) for name in unit.names]
    assert {"os.py", "json/decoder.py"} <= set(names)
    assert not [name for name in names if "/test/" in f"/{name}" or "site-packages" in name]


def test_an_existing_tokenizer_is_taken_as_it_is(tmp_path, corpus_dir):
    write_texts(tmp_path / "text", documents=20)
    model = corpus_dir / "tokenizer.model"
    build(recipe(tmp_path / "text", tokenizer=str(model)), tmp_path / "out", workers=1)
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == model.read_bytes()


def test_a_second_start_sees_what_is_there(tmp_path):
    write_texts(tmp_path / "text", documents=20)
    first = recipe(tmp_path / "text")
    build(first, tmp_path / "out", workers=1)
    assert is_current(first, tmp_path / "out")
    assert not is_current(recipe(tmp_path / "text", vocab_size=410), tmp_path / "out")
    (tmp_path / "text" / "new.txt").write_text(make_text(99))
    assert not is_current(first, tmp_path / "out")


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 0x40
    path.write_bytes(content)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "data_prep", *arguments], capture_output=True, text=True, check=False, timeout=120
    )


def test_the_command_builds_verifies_and_fails_in_one_line(tmp_path):
    write_texts(tmp_path / "text", documents=20)
    out = str(tmp_path / "out")
    built = run(str(tmp_path / "text"), "--out", out, "--vocab-size", "400", "--validation-fraction", "0.2")
    assert built.returncode == 0, built.stderr
    assert "unigram entropy" in built.stdout
    assert "each document ends with the token '</s>', id 2" in built.stdout
    assert "unknown" not in built.stdout
    assert "intact" in run("verify", out).stdout
    flip(tmp_path / "out" / "train.bin", 100)
    for failed in (run("verify", out), run(str(tmp_path / "nowhere"), "--out", str(tmp_path / "other"))):
        assert failed.returncode == 2
        assert failed.stdout == ""
        assert len([line for line in failed.stderr.splitlines() if line.startswith("error: ")]) == 1, failed.stderr
        assert "Traceback" not in failed.stderr
    assert not (tmp_path / "other").exists()
    assert [path.name for path in tmp_path.iterdir() if "building" in path.name] == []


def test_options_and_places_that_make_no_sense_are_refused(tmp_path):
    write_texts(tmp_path / "text", documents=20)
    (tmp_path / "file").touch()
    for arguments, problem in (
        (["--tokenizer", "t", "--vocab-size", "400"], "--vocab-size: applies to a tokenizer that is trained"),
        (["--tokenizer", "t", "--tokenizer-mb", "4"], "--tokenizer-mb: applies to a tokenizer that is trained"),
        (["--out", str(tmp_path / "file" / "out"), "--vocab-size", "400"], "cannot be written (Not a directory); use"),
    ):
        failed = run(str(tmp_path / "text"), "--out", str(tmp_path / "out"), *arguments)
        assert failed.returncode == 2, failed.stderr
        assert problem in failed.stderr
        assert "Traceback" not in failed.stderr


def test_text_that_a_tokenizer_loses_is_told(tmp_path):
    words = Tokenizer(WordLevel({"[UNK]": 0, "<|endoftext|>": 1, "a": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    words.add_special_tokens(["<|endoftext|>"])
    words.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "text").mkdir()
    for number in range(40):
        (tmp_path / "text" / f"{number}.txt").write_text(f"a b {number}")
    chosen = ["--tokenizer", str(tmp_path / "tokenizer.json"), "--validation-fraction", "0.3"]
    built = run(str(tmp_path / "text"), "--out", str(tmp_path / "out"), *chosen)
    assert built.returncode == 0, built.stderr
    assert "train: 50.0% of the tokens are unknown to the tokenizer; their text is lost" in built.stdout


def start_late(parent: int, folder: str) -> None:
    """Of two workers the second one."""
    try:
        Path(folder, "first").touch(exist_ok=False)
    except FileExistsError:
        time.sleep(0.3)
        Path(folder, "second").touch()


def test_a_worker_that_begins_late_finds_its_files(tmp_path):
    """It begins while the others end the build, which then removes what it would read."""
    from data_prep.encode import _in_processes

    assert list(_in_processes(len, ["ab", "c"], 2, start_late, (str(tmp_path),))) == [2, 1]
    assert {path.name for path in tmp_path.iterdir()} == {"first", "second"}


def kill_itself(task: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_ends_the_build_with_one_line(tmp_path, corpus_dir, monkeypatch):
    from data_prep import encode

    monkeypatch.setattr(encode, "encode_to_file", kill_itself)
    with pytest.raises(UserError, match="a worker was killed"):
        list(encode.encode_all([(None, "text", 0.5, tmp_path)], corpus_dir / "tokenizer.model", workers=1))
