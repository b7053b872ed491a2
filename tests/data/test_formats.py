"""What files are taken for. Their writers are those of the formats: json, csv, pandas, pyarrow, gzip, zstandard."""

from __future__ import annotations

import csv
import gzip
import io
import json
import shutil
import subprocess
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from data_prep.build import build, is_current
from data_prep.formats import CSV, JSON, JSON_LINES, PARQUET, TEXT, TSV, form_of
from data_prep.json_values import json_values
from data_prep.sources import RefusedError, list_units, read_unit, text_of
from tests.data.test_data_prep import read_all, recipe
from tests.texts import make_text

TEXTS = [make_text(number, sentences=3) for number in range(20)]
TEXTS += ['Quotes " and, commas; and\ttabs\r\nin lines', "naïve 漢字 🙂 \u2028 \\ {braces} [and more]", "x" * 200_000]
RECORDS = [{"id": number, "text": text, "meta": {"url": "", "n": [1, 2.5]}} for number, text in enumerate(TEXTS)]
BOM = b"\xef\xbb\xbf"


def json_lines(**options) -> bytes:
    return "".join(json.dumps(record, **options) + "\n" for record in RECORDS).encode()


def of_pandas(**options) -> bytes:
    import pandas

    return pandas.DataFrame(RECORDS).to_json(orient="records", **options).encode()


def of_csv(**options) -> bytes:
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, **options)
    writer.writerows([["id", "text"], *([record["id"], record["text"]] for record in RECORDS)])
    return stream.getvalue().encode()


def of_pyarrow_csv() -> bytes:
    import pyarrow
    import pyarrow.csv

    stream = io.BytesIO()
    pyarrow.csv.write_csv(pyarrow.table({"id": range(len(TEXTS)), "text": TEXTS}), stream)
    return stream.getvalue()


def of_pyarrow_parquet() -> bytes:
    import pyarrow
    import pyarrow.parquet

    stream = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), stream)
    return stream.getvalue()


# What is in a file, under the names that it may have, and what it is to be taken for.
WRITTEN: list[tuple[Callable[[], bytes], tuple[str, ...], str]] = [
    (json_lines, ("a.json", "a.jsonl", "a.ndjson", "a.txt", "part-00000"), JSON_LINES),
    (lambda: json_lines(ensure_ascii=False).replace(b"\n", b"\r\n\r\n"), ("a.json", "a.jsonl"), JSON_LINES),
    (lambda: BOM + json_lines(), ("a.json", "a.jsonl", "a.txt"), JSON_LINES),
    (lambda: of_pandas(lines=True), ("a.json",), JSON_LINES),
    (of_pandas, ("a.json", "a"), JSON),
    (lambda: BOM + json.dumps(RECORDS, indent=2).encode(), ("a.json", "a.jsonl", "a.txt"), JSON),
    (lambda: json.dumps(TEXTS).encode(), ("a.json",), JSON),
    (lambda: "".join(json.dumps(record) for record in RECORDS).encode(), ("a.json", "a"), JSON),
    (lambda: "\n".join(json.dumps(record, indent=4) for record in RECORDS).encode(), ("a.json", "a.txt"), JSON),
    (of_csv, ("a.csv", "A.CSV"), CSV),
    (of_pyarrow_csv, ("a.csv",), CSV),
    (lambda: BOM + of_csv(delimiter=";", quoting=csv.QUOTE_ALL), ("a.csv",), CSV),
    (lambda: of_csv(dialect="excel-tab"), ("a.tsv",), TSV),
    (of_pyarrow_parquet, ("a.parquet", "a.pq", "a.txt"), PARQUET),
]


@pytest.mark.parametrize(("write", "names", "form"), WRITTEN)
def test_a_file_is_what_its_content_and_its_name_say(tmp_path, write, names, form):
    content = write()
    packed = {} if form == PARQUET else {".gz": gzip.compress(content, 1), ".zst": zstandard.compress(content)}
    for name in names:
        for ending, own in {"": content, **packed}.items():
            path = tmp_path / (name + ending)
            path.write_bytes(own)
            assert (path.name, form_of(path, None)) == (path.name, form)
            assert read_documents(path) == TEXTS


def read_documents(path: Path, key: str = "text") -> list[str]:
    """Text of each document, or why it has none; blank lines are none."""
    found = []
    for unit in list_units([str(path)]):
        for document in read_unit(unit, key):
            try:
                found.append(text_of(document))
            except RefusedError as error:
                found += [] if error.reason == "blank" else [f"refused: {error.reason}"]
    return found


@pytest.mark.parametrize(
    "text",
    [
        "[Verse 1]\nWords of a song\n[Verse 2]\n", "[section]\nkey = 1\n", "{% extends 'base.html' %}\n{{ text }}\n",
        "{\n    int x = 1;\n}\n", "[a link](http://example.org) and so on", '{"not": closed\nand more text',
        '["only", "strings"]', "# Title\n\n    {\"text\": \"an example\"}\n\nand prose\nbelow it\n", "{'a': 1}",
        "1\n2\n", "{}]",
    ],
)  # fmt: skip
def test_text_that_begins_like_json_is_text(tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    assert form_of(tmp_path / "a.txt", None) == TEXT
    assert read_all(str(tmp_path)) == [text]


def test_long_first_lines_are_seen(tmp_path):
    """Longer than what is looked at: a line, an array in a line, an indented object, a text."""
    long = {"text": "long " * 100_000}
    forms = {
        "a.txt": (json.dumps(long) + "\n" + json.dumps({"text": "b"}), JSON_LINES, 2),
        "b.txt": (json.dumps([long, {"text": "b"}]), JSON, 2),
        "c.txt": (json.dumps(long, indent=1), JSON, 1),
        "d.txt": (long["text"], TEXT, 1),
        "e.json": (json.dumps(long["text"]), JSON, 1),
    }
    for name, (content, form, documents) in forms.items():
        (tmp_path / name).write_text(content)
        assert form_of(tmp_path / name, None) == form, name
        assert read_documents(tmp_path / name) == [long["text"], "b"][:documents], name


def test_json_lines_of_any_name_make_the_corpus_that_jsonl_makes(tmp_path):
    """Raw JSON, with its braces and keys, was the text of such files."""
    lines = "".join(json.dumps({"text": make_text(number)}) + "\n" for number in range(40)).encode()
    made = {}
    for name, content in {
        "a.jsonl": lines,
        "a.json": BOM + b"\n" + lines,
        "a.json.zst": zstandard.compress(lines),
    }.items():
        (tmp_path / name).write_bytes(content)
        manifest = build(recipe(tmp_path / name), tmp_path / f"out-{name}", workers=1)
        assert manifest["refused"]["counts"] == {}
        made[name] = [(tmp_path / f"out-{name}" / file).read_bytes() for file in ("train.bin", "tokenizer.model")]
    assert made["a.json"] == made["a.json.zst"] == made["a.jsonl"]
    assert is_current(recipe(tmp_path / "a.json"), tmp_path / "out-a.json")
    assert not is_current(recipe(tmp_path / "a.json", read_as="text"), tmp_path / "out-a.json")


def test_what_is_declared_is_not_looked_at(tmp_path):
    """A broken first line hides nothing; a table by another name and an array in a file of lines are not seen."""
    (tmp_path / "a").write_text('{"text": cut off\n' + '{"text": "a"}\n' * 3)
    assert read_documents(tmp_path / "a") == ["refused: bad_json", "a", "a", "a"]
    (tmp_path / "b.txt").write_bytes(of_csv())
    (tmp_path / "c.jsonl").write_text(json.dumps(RECORDS))
    for name, declared in (("b.txt", CSV), ("c.jsonl", JSON)):
        units = list_units([str(tmp_path / name)], declared)
        assert [text_of(document) for unit in units for document in read_unit(unit, "text")] == TEXTS


def test_all_forms_give_the_same_bytes_with_any_workers(tmp_path, corpus_dir):
    folder = tmp_path / "text"
    for number, (write, names, _) in enumerate(WRITTEN):
        (folder / str(number)).mkdir(parents=True)
        (folder / str(number) / names[0]).write_bytes(write())
    made = [recipe(folder, tokenizer=str(corpus_dir / "tokenizer.model"), deduplicate=False)] * 2
    manifests = [build(same, tmp_path / str(workers), workers) for workers, same in enumerate(made, 1)]
    assert sum(split["documents"] for split in manifests[0]["splits"].values()) == len(WRITTEN) * len(TEXTS)
    for name in ("manifest.json", "train.bin", "train.idx", "validation.bin", "validation.idx"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_an_object_per_file_is_a_document_per_file(tmp_path):
    """In few units, beside text; what is no document of its own is counted by name."""
    for number, text in enumerate(TEXTS[:8]):
        content = json.dumps({"text": text, "id": number}, indent=number % 2 or None).encode()
        path = tmp_path / f"{number}.json"
        (path.with_suffix(".json.gz") if number > 5 else path).write_bytes(
            gzip.compress(content) if number > 5 else content
        )
    (tmp_path / "8.txt").write_text("text")
    (tmp_path / "9.json").write_text('{"name": "no text",\n// a comment\n"version": 1}')
    (tmp_path / "91.txt.gz").write_bytes(gzip.compress(b"packed ") + gzip.compress(b"text"))
    (tmp_path / "92.json").write_bytes(b" \n")
    assert len(list_units([str(tmp_path)])) == 1
    found = [*TEXTS[:8], "text", "refused: bad_json", "packed text", "refused: empty"]
    assert read_documents(tmp_path) == found


def test_old_corpora_of_objects_as_text_are_not_current(tmp_path):
    """The bytes of the files are the same, what is read of them is not."""
    for number in range(20):
        (tmp_path / "text" / f"{number}.json").parent.mkdir(exist_ok=True)
        (tmp_path / "text" / f"{number}.json").write_text(json.dumps({"text": make_text(number)}))
    as_text = recipe(tmp_path / "text", read_as="text")
    build(as_text, tmp_path / "out", workers=1)
    texts = [text_of(document) for unit in list_units(as_text.sources, "text") for document in read_unit(unit, "text")]
    assert texts[0].startswith('{"text": ')
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    from data_prep.recipe import recipe_digest

    manifest["recipe"] = recipe_digest(recipe(tmp_path / "text"))
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
    assert not is_current(recipe(tmp_path / "text"), tmp_path / "out")


def pack_as_zstd_long(content: bytes) -> bytes:
    """A frame that asks for a window of 2 GiB, as zstd --long=31 writes one of what it reads from a pipe."""
    parameters = zstandard.ZstdCompressionParameters(window_log=31, hash_log=10, chain_log=10, strategy=1)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return packer.compress(content) + packer.flush()


def test_compressed_files_are_read_whole(tmp_path):
    lines = json_lines().splitlines(keepends=True)
    shares = [b"".join(lines[:3]), b"".join(lines[3:8]), b"".join(lines[8:])]
    skippable = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"size"  # pzstd begins each share so
    packed = {
        "members": b"".join(map(gzip.compress, shares)),
        "frames": b"".join(map(zstandard.compress, shares)),
        "skippable": b"".join(skippable + zstandard.compress(share) for share in shares),
        "long": pack_as_zstd_long(b"".join(lines)),
    }
    if shutil.which("zstd"):
        tool = ["zstd", "-1", "--long=31", "-c"]
        packed["tool"] = subprocess.run(tool, input=b"".join(lines), capture_output=True, check=True).stdout
    for name, content in packed.items():
        (tmp_path / name).write_bytes(content)
        assert read_documents(tmp_path / name) == TEXTS, name


def test_an_array_is_read_in_little_memory():
    stream = io.BytesIO(json.dumps([{"text": "x" * 1000, "n": number} for number in range(12_000)]).encode())
    tracemalloc.start()
    assert sum(len(value["text"]) for value in json_values(stream)) == 12_000_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6e6


@pytest.mark.slow  # the hub's library alone takes seconds to import
def test_what_datasets_writes_is_read(tmp_path):
    datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")
    made = datasets.Dataset.from_list(RECORDS)
    made.to_json(tmp_path / "a.json")
    made.to_json(tmp_path / "b.json.gz", compression="gzip")
    made.to_json(tmp_path / "c.json", lines=False)
    made.select_columns(["id", "text"]).to_csv(tmp_path / "d.csv")
    made.to_parquet(tmp_path / "e.parquet")
    assert read_all(str(tmp_path)) == TEXTS * 5
