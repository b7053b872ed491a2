"""The summary printed before text is read: detected formats, how it begins, why there is none."""

from __future__ import annotations

import json

from data_prep.overview import overview
from data_prep.sources import list_units
from tests.data.test_data_prep import run
from tests.data.test_formats import TEXTS, json_lines
from tests.texts import make_text


def test_detected_formats_are_printed_with_the_beginning_of_the_text(tmp_path):
    (tmp_path / "a.json").write_bytes(json_lines())
    (tmp_path / "b.json").write_bytes(b'\n\n{"id": 1, "body": "x"}\n{"id": 2}\n')
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "a.txt").write_text("some\ttext\x1b[0m")
    (tmp_path / "c" / "b.json").write_bytes(json.dumps([{"text": "c", "n": 1}]).encode())
    (tmp_path / "c" / "c.json").write_bytes(json.dumps([{"body": "c"}]).encode())
    names = [str(tmp_path / name) for name in ("a.json", "b.json", "c")]
    a, b, c_text, c_json = overview(list_units(names), "text")
    beginning = " ".join(TEXTS[0].split())[:60]
    assert a == f'{names[0]}: 1 file read as JSON lines; a.json:1 begins "{beginning}…"'
    assert b == f"{names[1]}: 1 file read as JSON lines; b.json:3 has no text (missing_key; its fields: id, body)"
    assert c_text == f'{names[2]}: 1 file read as text, one document per file; a.txt begins "some text?[0m"'
    assert c_json == f'{names[2]}: 2 files read as JSON, an array or concatenated values; b.json:1 begins "c"'


def test_the_command_prints_the_overview_and_obeys_options(tmp_path):
    (tmp_path / "text").mkdir()
    for number in range(20):
        lines = "".join(json.dumps({"body": make_text(number * 9 + line)}) + "\n" for line in range(9))
        (tmp_path / "text" / f"{number}.json").write_text(lines)
    given = [str(tmp_path / "text"), "--out", str(tmp_path / "out"), "--vocab-size", "400", "--workers", "1"]
    failed = run(*given)
    assert failed.returncode == 2
    assert "missing_key; its fields: body" in failed.stdout
    assert "gave no text" in failed.stderr
    assert "skipped: missing_key 180 (0.json:1); name the field or column with the text by --key" in failed.stderr
    built = run(*given, "--key", "body")
    assert built.returncode == 0, built.stderr
    assert '20 files read as JSON lines; 0.json:1 begins "# Document 0 The ' in built.stdout
    assert "180 documents" in built.stdout
    refused = run(*given, "--as", "text")
    assert "is a corpus made from other text or options" in refused.stderr
    asked = run(*given, "--as", "text", "--overwrite", "--validation-fraction", "0.2")
    assert '20 files read as text, one document per file; 0.json begins "{"body": ' in asked.stdout, asked.stderr
