"""Fuzzing for F10: files of any content and name give their documents, or are refused in one line."""

from __future__ import annotations

import gzip
import io
import json
import shutil
from typing import Any

import zstandard
from hypothesis import example, given
from hypothesis import strategies as st

from data_prep import json_values, sources
from data_prep.overview import overview
from data_prep.sources import list_units
from tests.faults.hostile import JSON, attempt, damaged, fuzz
from tests.faults.test_fuzz_lines import JSON_WORDS, read_documents

NAMES = st.builds(
    str.__add__, st.sampled_from(("a", "a.json", "a.jsonl", "a.txt", "a.csv", "a.tsv", "a.parquet", "a.py")),
    st.sampled_from(("", "", ".gz", ".zst")),
)  # fmt: skip
RECORDS: list[Any] = [{"text": f"text {number}\n", "n": [number, {"m": None}]} for number in range(6)]
LAYOUTS = {
    "lines": "\n".join(map(json.dumps, RECORDS)),
    "array": json.dumps(RECORDS),
    "indented": json.dumps(RECORDS, indent=1),
    "joined": "\n".join(json.dumps(record, indent=2) for record in RECORDS),
    "one": json.dumps(RECORDS[0]),
    "csv": 'n,text\r\n1,a\r\n2,"b, ""c""\nd"\r\n',
    "semicolons": "n;text\n1;a\n",
    "text": "[Verse 1]\nWords\n",
}
PACK = {"gz": gzip.compress, "zst": zstandard.compress}
TEXTS = {layout: [f"text {number}\n" for number in range(6)] for layout in ("lines", "array", "indented", "joined")}
TEXTS["one"] = ["text 0\n"]
WORDS = (*JSON_WORDS, b",", b"]", b"}", b";", b"\t", b"PAR1", b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"ustar", b"\xff\xfe")


@fuzz(200)
@given(records=st.lists(st.dictionaries(st.text(max_size=3), JSON, max_size=3) | JSON, max_size=6),
       layout=st.sampled_from(("array", "indented", "joined", "apart")), block=st.integers(1, 40))  # fmt: skip
@example(records=[12345, -1.5e-7, float("inf"), True, '\\\ud83d\ude00"'], layout="apart", block=1)
def test_f10_fuzz_json_parser_agrees_with_pythons(monkeypatch, records, layout, block):
    """For any block size; top-level lists are read element by element."""
    if layout in ("array", "indented"):
        written = json.dumps(records, indent=2 if layout == "indented" else None)
        expected = json.loads(written, parse_int=float)
    else:
        records = [record for record in records if not isinstance(record, list)]
        written = ("\n" if layout == "joined" else "\ufeff \r\n").join(
            json.dumps(record, indent=1) for record in records
        )
        expected = [json.loads(json.dumps(record), parse_int=float) for record in records]
    with monkeypatch.context() as patch:
        patch.setattr(json_values, "_BLOCK", block)
        assert repr(list(json_values.json_values(io.BytesIO(written.encode())))) == repr(expected)  # repr: NaN


@fuzz(300)
@given(
    data=st.data(),
    name=NAMES,
    layout=st.sampled_from(sorted(LAYOUTS)),
    harm=st.sampled_from(("none", "inside", "outside")),
    size=st.integers(9, 999),
)
def test_f10_fuzz_source_files_of_any_name(tmp_path, monkeypatch, data, name, layout, harm, size):
    """Files are read equally for any unit size; whatever can be read can also be summarized."""
    content = LAYOUTS[layout].encode()
    content = data.draw(damaged(content, WORDS)) if harm == "inside" else content
    content = PACK.get(name.rpartition(".")[2], bytes)(content)
    content = data.draw(damaged(content)) if harm == "outside" else content
    folder = tmp_path / "folder"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / name).write_bytes(content)
    whole = attempt(lambda: read_documents(folder))
    told = attempt(lambda: overview(list_units([str(folder)]), "text"))
    with monkeypatch.context() as patch:
        patch.setattr(sources, "_UNIT_BYTES", (size, size))
        assert attempt(lambda: read_documents(folder)) == whole
    assert told is not None or whole is None
    assert all(len(line.splitlines()) == 1 for line in told or ())
    by_content = layout in TEXTS and not name.startswith(("a.parquet", "a.jsonl"))
    if harm == "none" and (by_content or (name.startswith("a.jsonl") and layout == "lines")):
        assert whole == TEXTS[layout]
