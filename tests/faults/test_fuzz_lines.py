"""Fuzzing for F10: JSON lines of sources, of resumed runs and of reported runs."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import zstandard
from hypothesis import assume, example, given
from hypothesis import strategies as st

from data_prep import sources
from data_prep.sources import RefusedError, list_units, read_unit, text_of
from dynmoe.report.runs import read_run
from dynmoe.train.step_log import StepLog
from tests.faults.hostile import JSON, attempt, damaged, fuzz

JSON_WORDS = (
    b"{", b"[", b'"', b"\\", b"\n", b"\r", b"\0", b"NaN", b"1e999", b"9" * 5000, b"[" * 5000, b"\xff", b"\\ud800",
    b"\xef\xbb\xbf", b"null", b'"text": ', b"\xe2\x80\xa8",
)  # fmt: skip
OTHER_FORMATS = (
    b"\x1f\x8b\x08",
    b"\x28\xb5\x2f\xfd",
    b"PAR1",
    b"\xff\xfe",
    b"\xfe\xff",
)  # which a name does not change


@st.composite
def json_lines(draw: st.DrawFn) -> tuple[list[bytes], list[str | None]]:
    """JSON lines, and the expected text of each; None for a corrupt line."""
    lines: list[bytes] = []
    texts: list[str | None] = []
    for text in draw(st.lists(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=12), max_size=8)):
        record = {"text": text, "n": 1}
        line = json.dumps(record, ensure_ascii=draw(st.booleans())).encode()
        harm = draw(st.integers(0, 2)) == 0
        if harm:
            line = draw(damaged(line, JSON_WORDS) | JSON.map(lambda value: json.dumps(value).encode()))
        lines += line.split(b"\n")
        texts += [None if harm else text] * (line.count(b"\n") + 1)
    return lines, texts


def read_documents(path: Path) -> list[str]:
    """The text of each document, or the reason why it is refused."""
    found = []
    for unit in list_units([str(path)]):
        for document in read_unit(unit, "text"):
            try:
                found.append(text_of(document))
            except RefusedError as error:
                found.append(f"refused: {error.reason}")
    return found


@fuzz(100)
@given(written=json_lines(), size=st.integers(1, 60), end=st.sampled_from((b"", b"\n")))
def test_f10_fuzz_json_lines(tmp_path, monkeypatch, written, size, end):
    """Valid lines give their texts, whatever the other lines, the compression and the unit boundaries."""
    lines, texts = written
    content = b"\n".join(lines) + (end if lines else b"")
    assume(not content.startswith(OTHER_FORMATS))
    packed = {"a.jsonl": content, "a.jsonl.gz": gzip.compress(content, 1), "a.jsonl.zst": zstandard.compress(content)}
    results = []
    for name, own in packed.items():
        (tmp_path / name).write_bytes(own)
        results.append(attempt(lambda name=name: read_documents(tmp_path / name)))
    with monkeypatch.context() as patch:
        patch.setattr(sources, "_UNIT_BYTES", (size, size + len(content)))
        patch.setattr(sources, "_UNITS_WANTED", 50)
        results.append(attempt(lambda: read_documents(tmp_path / "a.jsonl")))
    assert results[0] == results[1] == results[2] == results[3]
    if not content:
        assert results[0] == ["refused: empty"]
        return
    counted = len(lines) if lines[-1] or end else len(lines) - 1
    assert len(results[0]) == counted
    for text, found in zip(texts, results[0], strict=False):
        if text is not None:
            assert found == (text if text.strip() else "refused: empty")


@fuzz(100)
@given(data=st.data(), pack=st.sampled_from((gzip.compress, zstandard.ZstdCompressor(write_checksum=True).compress)))
def test_f10_fuzz_packed_files(tmp_path, data, pack):
    """A corrupt file is refused, or the corruption has no effect."""
    lines = [json.dumps({"text": f"line {number} of {'x' * number}"}).encode() for number in range(40)]
    content = data.draw(damaged(pack(b"\n".join(lines))))
    path = tmp_path / ("a.jsonl.gz" if pack is gzip.compress else "a.jsonl.zst")
    path.write_bytes(content)
    found = attempt(lambda: read_documents(path))
    if found is not None and content and pack is gzip.compress:
        assert found == [json.loads(line)["text"] for line in lines]


@st.composite
def logs(draw: st.DrawFn, entries: list[dict[str, Any]]) -> tuple[bytes, list[dict[str, Any]]]:
    """A corrupt log, and its entries that are intact."""
    lines: list[bytes] = []
    sound: list[dict[str, Any]] = []
    for entry in entries:
        line = json.dumps(entry).encode()
        harm = draw(st.integers(0, 3)) == 0
        lines.append(
            draw(damaged(line, JSON_WORDS) | JSON.map(lambda value: json.dumps(value).encode())) if harm else line
        )
        sound += [] if harm else [entry]
    return b"\n".join(lines) + draw(st.sampled_from((b"", b"\n", b"\n{", b'\n{"train/step": 3'))), sound


ROWS = [
    {"train/step": step, "train/lm_loss": 9.0 / step, "train/tokens": 64.0 * step, "moe/experts_per_token_mean": 1.5,
     "moe/layer_00/active_experts": 4.0, "moe/layer_00/experts_per_token_mean": 1.5} for step in range(1, 9)
]  # fmt: skip
LAYER = {"experts_per_token": [0, 3, 5], "load": [1, 2, 3, 4], "active": [1, 1, 1, 0]}
HISTOGRAMS = [{"train/step": step, "layers": {"0": LAYER}} for step in (2, 4, 6, 8)]
EVENTS = [{"step": step, "layer": 0, "expert": 1, "rank": 0, "change": "added", "reason": "wanted"} for step in (3, 6)]
INCIDENTS = [{"step": step, "kind": "spike", "text": "the loss is 9.0"} for step in (2, 5)]


@fuzz(100)
@given(written=logs(ROWS), step=st.integers(0, 9))
@example(written=(b'{"train/step": "1"}\n7\n"train/step"\n{"train/step": null}\n\xff', []), step=9)
@example(written=(b'\r{"train/step": 1}\n', []), step=9)
def test_f10_fuzz_logs_of_a_resumed_run(tmp_path, written, step):
    """Every valid line up to the step is kept unchanged, and new entries are appended as whole lines."""
    content, sound = written
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(content)
    log = StepLog(path, "train/step", step)
    *kept, after = path.read_bytes().split(b"\n")  # not splitlines: a carriage return is space to JSON
    assert after == b""
    assert all(line in content.split(b"\n") for line in kept)
    entries = [json.loads(line) for line in kept]
    assert all(entry["train/step"] <= step for entry in entries)
    wanted = iter(entries)
    assert all(entry in wanted for entry in sound if entry["train/step"] <= step)
    assert repr(log.last) == repr(entries[-1] if entries else {})  # repr, as NaN is possible
    log.append({"train/step": step + 1})
    log.close()
    assert json.loads(path.read_bytes().splitlines()[-1]) == {"train/step": step + 1}


CONFIG = b"logging: {interval: 1}\n"
OUTCOMES = JSON | st.sampled_from(({"status": "failed"}, {"status": "preempted", "step": None}, {"status": []}))
LAYER_BEYOND_COUNTING = b'{"train/step": 1, "moe/layer_%s/active_experts": 1.0}' % (b"9" * 5000)


@fuzz(100)
@example(
    metrics=(LAYER_BEYOND_COUNTING, []), histograms=(b"", []), events=(b"", []), incidents=(b"", []), config=CONFIG,
    outcome=b"",
)  # fmt: skip
@given(
    metrics=logs(ROWS), histograms=logs(HISTOGRAMS), events=logs(EVENTS), incidents=logs(INCIDENTS),
    config=st.just(CONFIG) | damaged(CONFIG),
    outcome=st.binary(max_size=9) | OUTCOMES.map(lambda outcome: json.dumps(outcome).encode()),
)  # fmt: skip
def test_f10_fuzz_logs_of_a_reported_run(tmp_path, metrics, histograms, events, incidents, config, outcome):
    """Any run directory can be read; valid rows are kept unless a corrupt one conflicts with them."""
    files = {
        "config.yaml": config, "metrics.jsonl": metrics[0], "histograms.jsonl": histograms[0],
        "events.jsonl": events[0], "incidents.jsonl": incidents[0], "outcome.json": outcome,
    }  # fmt: skip
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    run = attempt(lambda: read_run(tmp_path))
    assert run is not None
    assert all(isinstance(problem, str) for problem in run.problems)
    steps = [row["train/step"] for row in run.rows]
    assert steps == sorted(set(steps))
    alien = [row["train/step"] for row in run.rows if row not in ROWS]
    for row in metrics[1]:
        assert row in run.rows or any(step >= row["train/step"] for step in alien)
    assert [event for event in run.events if event in events[1]] == events[1]
    assert all(len(xs) == len(ys) for xs, ys in (run.series(name) for name in run.rows[-1])) if run.rows else True
    assert run.layers in ([], [0]) or alien
    assert run.last("train/step") == (steps[-1] if steps else None)
