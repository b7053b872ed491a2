"""W&B without an account: the offline run holds every row."""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

_FILE_HEADER, _RECORD_HEADER, _BLOCK = 7, struct.Struct("<IHB"), 32768


def records(path: Path) -> Iterator[bytes]:
    """Records of a .wandb file: LevelDB's log format behind a header of seven bytes."""
    content, place, record = path.read_bytes(), _FILE_HEADER, b""
    while place + _RECORD_HEADER.size <= len(content):
        if _BLOCK - place % _BLOCK < _RECORD_HEADER.size:  # the rest of a block is padding
            place += _BLOCK - place % _BLOCK
            continue
        _, length, kind = _RECORD_HEADER.unpack_from(content, place)
        place += _RECORD_HEADER.size
        record += content[place : place + length]
        place += length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def read_offline(root: Path) -> tuple[set[str], list[dict[str, str]]]:
    """Run ids and history rows of every offline run below ``root``."""
    from wandb.proto import wandb_internal_pb2

    ids, rows = set(), []
    for path in sorted(root.rglob("run-*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        for data in records(path):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "history":
                rows.append({item.key or "/".join(item.nested_key): item.value_json for item in record.history.item})
            elif record.WhichOneof("record_type") == "run":
                ids.add(record.run.run_id)
    return ids, rows


def test_an_offline_run_holds_every_row_and_a_resumed_one_keeps_its_id(tmp_path):
    from dynmoe.train.wandb_view import WandbView

    first = WandbView("offline", "project", "run", tmp_path, {"train": {"steps": 4}}, None)
    for step in (1, 2):
        first.log({"train/step": step, "moe/layer_00/experts_per_token_mean": 2.5})
    first.close()
    time.sleep(1.1)  # W&B names its directory by the second
    second = WandbView("offline", "project", "run", tmp_path, {}, first.run_id)
    second.log({"train/step": 3, "train/loss": 1.0})
    second.close()
    ids, rows = read_offline(tmp_path)
    assert ids == {first.run_id} == {second.run_id}
    assert [row["train/step"] for row in rows] == ["1", "2", "3"]
    assert rows[0]["moe/layer_00/experts_per_token_mean"] == "2.5"


def test_an_unreachable_server_costs_seconds_and_no_row(tmp_path, monkeypatch, capsys):
    from dynmoe.train.wandb_view import WandbView

    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    start = time.monotonic()
    view = WandbView("online", "project", "run", tmp_path, {}, None)
    assert time.monotonic() - start < 30  # it may take 10 s to give up, and some to start anew
    assert "logging offline" in capsys.readouterr().out
    view.log({"train/step": 1})
    view.close()
    ids, rows = read_offline(tmp_path)
    assert view.run_id in ids
    assert [row["train/step"] for row in rows] == ["1"]


@pytest.mark.parametrize("key", ["", "short"])
def test_a_missing_or_malformed_key_means_offline(tmp_path, monkeypatch, capsys, key):
    from dynmoe.train.wandb_view import WandbView

    monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    view = WandbView("online", "project", "run", tmp_path, {}, None)
    view.log({"train/step": 1})
    view.close()
    assert "logging offline" in capsys.readouterr().out
    assert len(read_offline(tmp_path)[1]) == 1
