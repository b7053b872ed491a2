"""Corpora of real size: units, workers, nodes, kills, copies; and files of Megatron's own tool."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data_prep import sources
from data_prep.build import build
from data_prep.encode import WordEncoder
from data_prep.merge import find_copies
from data_prep.recipe import Nodes, Recipe
from data_prep.sources import list_units, read_unit
from dynmoe.config import DataConfig
from dynmoe.data.batches import PretrainingData
from dynmoe.data.corpus import Corpus, open_corpora
from dynmoe.data.indexed import check_indexed, write_index
from dynmoe.data.tokenizer import Tokenizer
from dynmoe.data.tokenizer_files import open_tokenizer
from dynmoe.errors import UserError
from harness.processes import is_running
from tests.data.megatron_order import DType, IndexedDatasetBuilder
from tests.data.test_data_prep import contents, read_all, recipe, run
from tests.texts import make_text, write_texts

TEXTS = [make_text(number) for number in range(120)]


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Units of a few documents."""
    monkeypatch.setattr(sources, "_UNIT_BYTES", (2_000, 2_000))


def write_jsonl(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def write_parquet(path: Path, texts: list[str], **options) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": texts, "number": range(len(texts))}), path, **options)


@pytest.mark.parametrize("form", ["files", "jsonl", "parquet"])
def test_units_hold_every_document_once_and_in_order(tmp_path, small_units, form):
    if form == "files":
        for number, text in enumerate(TEXTS):
            (tmp_path / f"{number:03d}.txt").write_text(text)
    elif form == "jsonl":
        write_jsonl(tmp_path / "a.jsonl", TEXTS)
    else:
        write_parquet(tmp_path / "a.parquet", TEXTS, row_group_size=5)
    units = list_units([str(tmp_path)])
    assert len(units) > 10
    assert read_all(str(tmp_path)) == TEXTS


@given(lines=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\n"), max_size=12), max_size=40),
       size=st.integers(1, 50))  # fmt: skip
def test_lines_are_cut_at_any_size(tmp_path_factory, lines, size):
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    path.write_bytes("\n".join(lines).encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "_UNIT_BYTES", (size, size))
        units = list_units([str(path)])
    read = [document.content for unit in units for document in read_unit(unit, "text")]
    with path.open("rb") as stored:
        assert read == (list(stored) or [b""])


def test_the_bytes_do_not_depend_on_units_nor_on_the_packing(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    write_parquet(tmp_path / "a.parquet", TEXTS)
    tokenizer = tmp_path / "whole" / "tokenizer.model"
    build(recipe(tmp_path / "a.jsonl"), tmp_path / "whole", workers=1)
    monkeypatch.setattr(sources, "_UNIT_BYTES", (3_000, 3_000))
    for name in ("a.jsonl", "a.parquet"):
        build(recipe(tmp_path / name, tokenizer=str(tokenizer)), tmp_path / name.replace(".", "_"), workers=2)
        for file in ("train.bin", "train.idx", "validation.bin", "validation.idx"):
            assert (tmp_path / name.replace(".", "_") / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_a_column_that_is_not_there_is_named(tmp_path):
    write_parquet(tmp_path / "a.parquet", TEXTS[:3])
    with pytest.raises(UserError, match=r"--key body: .*a\.parquet has the columns text, number; use"):
        list(read_unit(list_units([str(tmp_path / "a.parquet")])[0], "body"))
    (tmp_path / "b.parquet").write_bytes(b"PAR1 and nothing")
    with pytest.raises(UserError, match=r"b\.parquet: cannot be read"):
        list_units([str(tmp_path)])


@pytest.mark.slow  # the hub's library alone takes seconds to import, in each process
def test_datasets_are_streamed_shard_by_shard(tmp_path, monkeypatch):
    """Through the hub's library, over files of this machine."""
    pytest.importorskip("datasets", reason="the package datasets is not installed")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    for number in range(3):
        write_parquet(tmp_path / "set" / f"train-{number}.parquet", TEXTS[number * 40 : number * 40 + 40])
    source = f"hf:{tmp_path / 'set'}"
    assert [unit.start for unit in list_units([source])] == [0, 1, 2]
    assert read_all(source) == TEXTS
    manifest = build(Recipe([source], vocab_size=400, validation_fraction=0.2), tmp_path / "out", workers=2)
    assert sum(split["documents"] for split in manifest["splits"].values()) == 120
    with pytest.raises(UserError, match="hf:nobody/nothing: cannot be opened"):
        list_units(["hf:nobody/nothing"])


def test_copies_are_left_out_wherever_they_are(tmp_path, small_units):
    copies = [TEXTS[3], TEXTS[50], TEXTS[3]]
    write_jsonl(tmp_path / "a.jsonl", [*TEXTS[:60], *copies, *TEXTS[60:]])
    write_jsonl(tmp_path / "b.jsonl", TEXTS[:60])
    tokenizer = build_tokenizer(tmp_path)
    once = tmp_path / "once.jsonl"
    write_jsonl(once, TEXTS)
    both = Recipe([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")], tokenizer=tokenizer, validation_fraction=0.2)
    manifest = build(both, tmp_path / "both", workers=2)
    assert manifest["refused"]["counts"] == {"copy": 63}
    names = manifest["refused"]["first_names"]["copy"]
    assert names[:5] == ["a.jsonl:61", "a.jsonl:62", "a.jsonl:63", "b.jsonl:1", "b.jsonl:2"]
    build(Recipe([str(once)], tokenizer=tokenizer, validation_fraction=0.2), tmp_path / "once", workers=1)
    assert (tmp_path / "both" / "train.bin").read_bytes() == (tmp_path / "once" / "train.bin").read_bytes()
    kept = build(
        Recipe(both.sources, tokenizer=tokenizer, validation_fraction=0.2, deduplicate=False), tmp_path / "kept", 1
    )
    assert sum(split["documents"] for split in kept["splits"].values()) == 183


def build_tokenizer(folder: Path) -> str:
    write_texts(folder / "of_tokenizer", documents=60)
    build(recipe(folder / "of_tokenizer"), folder / "tokenizer", workers=1)
    return str(folder / "tokenizer" / "tokenizer.model")


def test_copies_are_found_in_any_number_of_epochs(tmp_path):
    random = np.random.default_rng(0)
    digests = random.integers(0, 30, (7, 20, 2)).astype(np.uint64)
    parts = [tmp_path / f"{number}.npz" for number in range(7)]
    for path, own in zip(parts, digests, strict=True):
        np.savez(path, facts=np.frombuffer(b"{}", np.uint8), digests=own, lengths=np.zeros(20, np.int32))
    seen = set()
    expected = []
    for own in digests:
        expected.append([(pair := tuple(digest)) in seen or seen.add(pair) for digest in own.tolist()])
    for at_a_time in (7, 50, 1000):
        assert [[bool(one) for one in part] for part in find_copies(parts, at_a_time)] == [
            [bool(one) for one in part] for part in expected
        ]


@given(text=st.text(max_size=80))
def test_word_by_word_gives_the_tokens_of_sentencepiece(corpus_dir, text):
    tokenizer = open_tokenizer(corpus_dir / "tokenizer.model")
    assert tokenizer.splits_into_words
    for own in (text, f"  {text}\n\n {text} \u2581 {text}\u2581\u2581x"):
        assert WordEncoder(tokenizer).encode(own).tolist() == tokenizer.encode(own)


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "unigram"},
        {"byte_fallback": False},
        {"add_dummy_prefix": True},
        {"normalization_rule_name": "nmt_nfkc"},
        {"split_by_whitespace": False},
        {"user_defined_symbols": ["of the"]},
    ],
)
def test_other_tokenizers_get_whole_texts(tmp_path, options):
    import sentencepiece

    given = {
        "model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity", "add_dummy_prefix": False,
        "remove_extra_whitespaces": False, "minloglevel": 2, "vocab_size": 400,
    } | options  # fmt: skip
    lines = "\n".join(TEXTS).split("\n")
    prefix = str(tmp_path / "other")
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_prefix=prefix, **given)
    tokenizer = open_tokenizer(f"{prefix}.model")
    assert not tokenizer.splits_into_words
    text = "\n".join(TEXTS[:20])
    assert WordEncoder(tokenizer).encode(text).tolist() == tokenizer.encode(text)


def start(folder: Path, *options: str) -> subprocess.Popen[str]:
    """A build in a process of its own, over units of 2,000 bytes."""
    program = "import data_prep.sources as s; s._UNIT_BYTES = (2000, 2000); from data_prep.__main__ import main; main()"
    arguments = [str(folder / "a.jsonl"), "--out", str(folder / "out"), "--vocab-size", "400"]
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments, "--validation-fraction", "0.2", "--workers", "2", *options],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def finished_parts(folder: Path) -> int:
    return len(list((folder / "out.building" / "parts").glob("[0-9]*.npz")))


def test_a_killed_build_resumes_and_gives_the_same_bytes(tmp_path):
    for place in ("killed", "undisturbed"):
        (tmp_path / place).mkdir()
        write_jsonl(tmp_path / place / "a.jsonl", TEXTS * 20)
    assert start(tmp_path / "undisturbed").wait(60) == 0
    process = start(tmp_path / "killed")
    deadline = time.monotonic() + 60
    while finished_parts(tmp_path / "killed") < 20:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    while any(is_running(int(child)) for child in children):
        assert time.monotonic() < deadline, "workers outlived the build"
        time.sleep(0.02)
    there = finished_parts(tmp_path / "killed")
    again = start(tmp_path / "killed")
    output, _ = again.communicate(timeout=60)
    assert again.returncode == 0, output
    assert f"resuming an interrupted build with {there} finished parts" in output
    assert contents(tmp_path / "killed" / "out") == contents(tmp_path / "undisturbed" / "out")
    assert not (tmp_path / "killed" / "out.building").exists()


def test_changed_text_starts_an_interrupted_build_anew(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    left = tmp_path / "out.building"
    (left / "parts").mkdir(parents=True)
    (left / "recipe.json").write_text("of something else")
    (left / "parts" / "00000000.npz").write_text("nothing")
    build(recipe(tmp_path / "a.jsonl"), tmp_path / "out", workers=1)
    assert Corpus.open(tmp_path / "out").manifest["splits"]["train"]["documents"] > 50


@pytest.mark.slow
def test_nodes_share_the_work_and_give_the_same_bytes(tmp_path):
    for place in ("one", "three"):
        (tmp_path / place).mkdir()
        write_jsonl(tmp_path / place / "a.jsonl", TEXTS * 5)
    assert start(tmp_path / "one").wait(60) == 0
    nodes = [start(tmp_path / "three", "--nodes", "3", "--node", str(node)) for node in (2, 1, 0)]
    outputs = [node.communicate(timeout=60)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0, 0], outputs
    assert "node 2 has encoded its part" in outputs[0]
    shares = [int(output.split("encoded ")[1].split()[0]) for output in outputs]
    assert sum(shares) == 600
    assert all(share > 100 for share in shares)
    assert contents(tmp_path / "one" / "out") == contents(tmp_path / "three" / "out")
    with pytest.raises(UserError, match="--node 3: with --nodes 3, use 0 to 2"):
        Nodes(3, 3)


def test_a_node_that_comes_late_finds_all_done(tmp_path):
    """Every part was there, and node 0 has put them together in the meantime."""
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    late = start(tmp_path, "--nodes", "2", "--node", "1")
    time.sleep(2.0)
    assert late.poll() is None, "it waits for node 0"
    build(recipe(tmp_path / "a.jsonl"), tmp_path / "built", workers=1)
    (tmp_path / "built").rename(tmp_path / "out")
    output, _ = late.communicate(timeout=30)
    assert late.returncode == 0, output
    assert "node 1 has encoded its part" in output


def test_an_index_has_the_bytes_of_megatrons_own_builder(tmp_path):
    documents = [np.arange(length) % 300 for length in (5, 1, 7, 2, 2, 9)]
    for code, dtype in ((DType.optimal_dtype(300), "<u2"), (DType.optimal_dtype(70000), "<i4")):
        builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), code)
        lengths = [len(document) for document in documents]
        for tokens in documents:
            builder.add_document(torch.from_numpy(tokens), [len(tokens)])
        builder.finalize(str(tmp_path / "theirs.idx"))
        write_index(tmp_path / "ours", np.dtype(dtype), np.array(lengths, np.int32))
        assert (tmp_path / "ours.idx").read_bytes() == (tmp_path / "theirs.idx").read_bytes()


def write_as_megatron_does(prefix: Path, tokenizer: Tokenizer, texts: list[str]) -> None:
    """What preprocess_data.py writes with --append-eod, and with --split-sentences: several sequences a document."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", DType.optimal_dtype(tokenizer.vocab_size))
    for text in texts:
        sentences = [tokenizer.encode(line) for line in text.split("\n") if line]
        sentences[-1].append(tokenizer.eod)
        builder.add_document(torch.tensor([*chain.from_iterable(sentences)]), [len(sentence) for sentence in sentences])
    builder.finalize(f"{prefix}.idx")


def test_files_of_megatrons_tool_are_taken_unchanged(tmp_path, corpus_dir):
    tokenizer = open_tokenizer(corpus_dir / "tokenizer.model")
    for name, texts in (("my.en_text_document", TEXTS[:100]), ("other_text_document", TEXTS[100:])):
        write_as_megatron_does(tmp_path / name, tokenizer, texts)
    model = str(corpus_dir / "tokenizer.model")
    prefix = str(tmp_path / "my.en_text_document")
    done = run("adopt", prefix, "--validation", str(tmp_path / "other_text_document"), "--tokenizer", model,
               "--out", str(tmp_path / "two"))  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "of text" not in done.stdout, "its length is not known"
    for split, name in (("train", "my.en_text_document"), ("validation", "other_text_document")):
        for suffix in (".bin", ".idx"):
            assert (tmp_path / "two" / f"{split}{suffix}").read_bytes() == (tmp_path / f"{name}{suffix}").read_bytes()
    assert run("adopt", prefix, "--tokenizer", model, "--out", str(tmp_path / "one")).returncode == 0
    splits = {split: check_indexed(tmp_path / "one" / split) for split in ("train", "validation")}
    assert [splits[split].num_documents for split in splits] == [98, 2]
    whole = (tmp_path / "one" / "train.bin").read_bytes() + (tmp_path / "one" / "validation.bin").read_bytes()
    assert whole == Path(f"{prefix}.bin").read_bytes()
    for name in ("one", "two"):
        corpora = open_corpora([str(tmp_path / name)], 32)
        corpora[0].verify()
        data = PretrainingData(corpora, DataConfig(sequence_length=32), 0, tmp_path / f"cache_{name}")
        batch = data.train_batch(range(3))
        assert batch.tokens_BS.shape == (3, 32)
    assert "two: exists" in run("adopt", prefix, "--tokenizer", model, "--out", str(tmp_path / "two")).stderr


def test_a_blend_over_many_shards_keeps_its_weights(one_rank, tmp_path, corpus_dir):
    """Each of 24 corpora has one token of its own, so that a sample tells where it comes from."""
    tokenizer = str(corpus_dir / "tokenizer.model")
    dirs = []
    weights = [1 + number % 4 for number in range(24)]
    for number in range(24):
        prefix = tmp_path / f"shard_{number}"
        for name in (f"{prefix}", f"{prefix}_validation"):
            builder = IndexedDatasetBuilder(f"{name}.bin", DType.optimal_dtype(400))
            for _ in range(60):
                builder.add_document(torch.full((50,), 100 + number), [50])
            builder.finalize(f"{name}.idx")
        out = str(tmp_path / f"corpus_{number}")
        done = run_adopt(str(prefix), f"{prefix}_validation", tokenizer, out)
        dirs.append(done)
    (first,) = one_rank.run(first_tokens, dirs, [float(weight) for weight in weights], tmp_path / "cache")
    counts = torch.bincount(first - 100, minlength=24)
    expected = torch.tensor(weights) / sum(weights) * len(first)
    assert (counts - expected).abs().max() <= 1


def first_tokens(dirs: list[str], weights: list[float], cache: Path) -> torch.Tensor:
    """The first token of each sample of a pass."""
    data = PretrainingData(open_corpora(dirs, 16), DataConfig(dirs, weights, 16), 0, cache)
    return data.train_batch(range(data.samples_per_epoch)).tokens_BS[:, 0]


def run_adopt(train: str, validation: str, tokenizer: str, out: str) -> str:
    from data_prep.adopt import adopt

    adopt(Path(train), Path(validation), 0.02, open_tokenizer(tokenizer), Path(out))
    return out


def peak_mb(process: subprocess.Popen[str]) -> float:
    """The most memory that the build and its workers had at once, seen ten times a second."""
    peak = 0.0
    while process.poll() is None:
        total = 0.0
        for status in Path("/proc").glob("[0-9]*/status"):
            try:
                fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
                if os.getsid(int(fields["Pid"])) == process.pid:
                    total += int(fields.get("VmRSS", "0 kB").split()[0]) / 1e3
            except (OSError, ProcessLookupError):
                continue
        peak = max(peak, total)
        time.sleep(0.1)
    return peak


def start_large(folder: Path, source: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "data_prep", str(source), "--out", str(folder), "--vocab-size", "8000",
         "--tokenizer-mb", "2", "--workers", "2"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


@pytest.mark.slow
def test_a_gigabyte_is_prepared_in_flat_memory_and_survives_a_kill(tmp_path, summary):
    from tests.texts import write_gigabytes

    write_gigabytes(tmp_path / "tenth.jsonl", 0.1)
    write_gigabytes(tmp_path / "whole.jsonl", 1.0)
    tenth = peak_mb(start_large(tmp_path / "tenth", tmp_path / "tenth.jsonl"))
    process = start_large(tmp_path / "undisturbed", tmp_path / "whole.jsonl")
    whole = peak_mb(process)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    speed = next(line for line in output.splitlines() if "MB/s" in line)
    summary.append(f"1 GB of text: peak {whole:.0f} MB over all processes, 0.1 GB: {tenth:.0f} MB; {speed}")
    assert whole < 1.5 * tenth

    process = start_large(tmp_path / "killed", tmp_path / "whole.jsonl")
    units = len(list_units([str(tmp_path / "whole.jsonl")]))
    while len(list((tmp_path / "killed.building" / "parts").glob("[0-9]*.npz"))) < units // 2:
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    again = start_large(tmp_path / "killed", tmp_path / "whole.jsonl")
    output = again.communicate()[0]
    assert again.returncode == 0, output
    assert "resuming an interrupted build" in output
    assert contents(tmp_path / "killed") == contents(tmp_path / "undisturbed")
