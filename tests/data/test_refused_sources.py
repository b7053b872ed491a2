"""Sources that cannot be read, and documents that have no text: named, with the reason."""

from __future__ import annotations

import gzip
import json
import shutil
import tarfile
from pathlib import Path

import pytest
import zstandard

from data_prep.formats import ARCHIVE, TEXT, form_of
from dynmoe.errors import UserError
from tests.data.test_formats import RECORDS, json_lines, of_pyarrow_parquet, read_documents

REFUSED: dict[str, tuple[bytes, str]] = {
    "cut.json": (json.dumps(RECORDS * 3).encode()[:-50], r"cannot be read \(Unterminated string .*at character \d+\)"),
    "broken.json": (b'[{"text": "a"}, {"text": "b"} {}]' + b" " * 300_000, r"Expecting ',' or '\]' at character 30"),
    "cut.csv": (b'text,n\n"a,1\n', r"cannot be read \(line 2: unexpected end of data\)"),
    "quote.csv": (b'text,n\n"a"b,1\n', r"line 2: ',' expected after '\"'"),
    "column.csv": (
        b"id,body\n1,a\n", r"--key text: .*column\.csv has the columns id, body; use the one that contains the text",
    ),
    "column.tsv": (b"id;body\n1;a\n", r"--key text: .*column\.tsv has the columns id, body; use"),
    "a.json.gz": (json_lines(), "is neither gzip nor Zstandard, despite its name"),
    "wide.json": (
        json_lines().decode().encode("utf-16"), "is UTF-16; convert it to UTF-8 with iconv -f UTF-16 -t UTF-8",
    ),
    "cut.txt.zst": (zstandard.compress(json_lines())[:-9], "cannot be read .the compressed text is truncated"),
    "a.jsonl.xz": (
        b"\xfd7zXZ\x00 and so on", "is an archive or compressed by other means than gzip or Zstandard; unpack it",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_by_name_and_reason(tmp_path, name):
    content, reason = REFUSED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name}.*{reason}|{reason}") as caught:
        read_documents(tmp_path / name)
    assert name in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_rows_of_a_table_that_are_not_whole_are_counted(tmp_path):
    (tmp_path / "a.csv").write_bytes(b'n,text\n1,a\n\n2,b, and c\n3\n4,"d, and\ne"\n5,\n6,caf\xe9\n')
    found = ["a", "refused: bad_row", "refused: bad_row", "d, and\ne", "refused: empty", "refused: not_utf8"]
    assert read_documents(tmp_path / "a.csv") == found
    (tmp_path / "one.csv").write_bytes(b"text\na\nb;c\n")
    assert read_documents(tmp_path / "one.csv") == ["a", "b;c"]


def test_broken_utf8_costs_the_value_it_is_in(tmp_path):
    (tmp_path / "a.json").write_bytes(b'[{"text": "a"}, {"text": "caf\xe9"}, {"body": 1}, 7, {"text": 7}, "b"]')
    refused = ["refused: not_utf8", *["refused: missing_key"] * 3]
    assert read_documents(tmp_path / "a.json") == ["a", *refused, "b"]


def test_archives_in_a_folder_are_named_and_left_out(tmp_path):
    with tarfile.open(tmp_path / "b.tar.gz", "w:gz") as archive:
        archive.add(__file__, "test.py")
    shutil.make_archive(str(tmp_path / "c"), "zip", Path(__file__).parent, "__init__.py")
    (tmp_path / "d.parquet.gz").write_bytes(gzip.compress(of_pyarrow_parquet()))
    (tmp_path / "a.txt").write_text("text")
    assert [form_of(path, None) for path in sorted(tmp_path.iterdir())] == [TEXT, ARCHIVE, ARCHIVE, ARCHIVE]
    assert read_documents(tmp_path) == ["text", *["refused: archive"] * 3]
