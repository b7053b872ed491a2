"""W&B without an account: the files of offline runs have every row."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from dynmoe.config import load_config
from dynmoe.config.logging import LoggingConfig
from dynmoe.errors import ConfigError
from dynmoe.train.run_directory import RunDirectory
from tests.train.cases import TrainingProcess, curve, parameter_hashes, read_rows
from tests.train.wandb_server import WandbServer

pytestmark = pytest.mark.alone

_FILE_HEADER = 7
_RECORD_HEADER = struct.Struct("<IHB")
_BLOCK = 32768


def records(path: Path) -> Iterator[bytes]:
    """Yields the records of a .wandb file: LevelDB's log format after a header of seven bytes."""
    content = path.read_bytes()
    place = _FILE_HEADER
    record = b""
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


def logged_steps(rows: list[dict[str, str]]) -> list[str]:
    """Steps of the rows of metrics, without the row of pictures, to which W&B adds the last step."""
    return [row["train/step"] for row in rows if "report/loss/_type" not in row]


def names(root: Path) -> set[str]:
    """Names of all offline runs below ``root``, of their groups and of their artifacts."""
    from wandb.proto import wandb_internal_pb2

    found = set()
    for path in root.rglob("run-*.wandb"):
        for data in records(path):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "run":
                found |= {record.run.display_name, record.run.run_group}
            elif record.WhichOneof("record_type") == "artifact":
                found |= {record.artifact.name}
            elif record.WhichOneof("record_type") == "request" and record.request.HasField("log_artifact"):
                found |= {record.request.log_artifact.artifact.name}
    return found


def read_offline(root: Path) -> tuple[set[str], list[dict[str, str]]]:
    """Run ids and history rows of all offline runs below ``root``."""
    from wandb.proto import wandb_internal_pb2

    ids = set()
    rows = []
    for path in sorted(root.rglob("run-*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        for data in records(path):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "history":
                rows.append({item.key or "/".join(item.nested_key): item.value_json for item in record.history.item})
            elif record.WhichOneof("record_type") == "run":
                ids.add(record.run.run_id)
    return ids, rows


def artifacts(root: Path) -> dict[str, list[str]]:
    """Files and references of the artifacts of offline runs below ``root``, by type."""
    from wandb.proto import wandb_internal_pb2

    found = {}
    for path in root.rglob("run-*.wandb"):
        for data in records(path):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "request" and record.request.HasField("log_artifact"):
                artifact = record.request.log_artifact.artifact
                found[artifact.type] = [entry.ref or entry.path for entry in artifact.manifest.contents]
            elif record.WhichOneof("record_type") == "artifact":
                artifact = record.artifact
                found[artifact.type] = [entry.ref or entry.path for entry in artifact.manifest.contents]
    return found


@pytest.fixture
def open_view(tmp_path, corpus_dir):
    """Creates a view of a run in ``tmp_path``, as the trainer does."""
    from dynmoe.train.wandb_view import WandbView

    def make(mode: str, run_id: str | None = None, pictures=lambda path: {}, name="run") -> WandbView:
        overrides = [f"run.dir={tmp_path}", f"run.name={name}", f"logging.wandb={mode}", f"data.dirs=[{corpus_dir}]"]
        config = load_config(None, overrides)
        directory = RunDirectory(config.run.path)
        directory.path.mkdir(exist_ok=True)
        directory.begin(config.to_yaml(), {"tokenizer.model": b"tokenizer"})
        return WandbView(config, directory, pictures, run_id)

    return make


def test_offline_run_has_every_row_and_keeps_its_id_on_resume(tmp_path, open_view):
    first = open_view("offline")
    for step in (1, 2):
        first.log({"train/step": step, "moe/layer_00/experts_per_token_mean": 2.5})
    first.close()
    time.sleep(1.1)  # W&B names its directory by the second
    second = open_view("offline")  # without an id from a checkpoint
    second.log({"train/step": 3, "train/loss": 1.0})
    second.close()
    ids, rows = read_offline(tmp_path)
    assert ids == {first.run_id} == {second.run_id}
    assert logged_steps(rows) == ["1", "2", "3"]
    assert rows[0]["moe/layer_00/experts_per_token_mean"] == "2.5"


def test_wandb_run_has_histograms_pictures_and_artifacts(tmp_path, open_view):
    """The name of the run is longer than W&B's limit."""
    import plotly.graph_objects as go
    from wandb.sdk.artifacts._validators import validate_artifact_name

    name = "run-" + "x" * 236
    view = open_view("offline", pictures=lambda path: {"loss": go.Figure(go.Scatter(x=[1], y=[2]))}, name=name)
    layer = {"experts_per_token": [0, 5, 3], "load": [8, 0], "active": [1, 0]}
    view.log({"train/step": 10}, {"train/step": 10, "layers": {"3": layer}})
    checkpoint = tmp_path / name / "checkpoints" / "step_00000010"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")
    view.close()
    _, rows = read_offline(tmp_path)
    histogram = [json.loads(rows[0][f"moe/layer_03/experts_per_token/{part}"]) for part in ("values", "bins")]
    assert histogram == [[0, 5, 3], [-0.5, 0.5, 1.5, 2.5]]
    assert rows[0]["moe/load/_type"] == rows[1]["report/loss/_type"] == '"plotly-file"'
    picture = json.loads(next(tmp_path.rglob("moe/load_*.plotly.json")).read_text())
    assert (picture["data"][0]["z"], picture["data"][0]["y"]) == ([[8, None]], ["layer 3"])
    found = artifacts(tmp_path)
    assert sorted(found["inputs"]) == ["config.yaml", "corpus_0_manifest.json", "tokenizer.model"]
    assert found["checkpoint"] == [f"file://{checkpoint.resolve()}/manifest.json"]
    assert len(names(tmp_path)) == 3, "run and group share a name, and each artifact has its own"
    assert all(validate_artifact_name(own).startswith("run-xxxx") for own in names(tmp_path))


@pytest.mark.parametrize("ending", ["", "-inputs", "-checkpoint"])
def test_long_names_are_shortened_and_stay_distinct(ending):
    """The limit of W&B for names of artifacts is also the server's limit for runs and groups."""
    import wandb
    from wandb.sdk.artifacts._validators import NAME_MAXLEN

    from dynmoe.train.wandb_view import name_within_limit

    fits = "n" * (NAME_MAXLEN - len(ending))
    assert name_within_limit(fits, ending) == fits + ending
    long = [f"{fits}{number}" for number in range(100)]
    short = [name_within_limit(name, ending) for name in long]
    assert len(set(short)) == 100
    assert {len(name) for name in short} == {NAME_MAXLEN}
    assert all(wandb.Artifact(name, type="inputs").name == name for name in short)
    assert all(name.startswith("n" * 100) and name.endswith(ending) for name in short)
    assert short == [name_within_limit(name, ending) for name in long], "a resumed run keeps its name"


@pytest.mark.parametrize("project", ["a", "x" * 128, "x" * 129, "", *(f"a{c}b" for c in "/\\#?%: é.,;'&=+-_@")])
def test_invalid_project_name_is_refused_by_the_configuration(project):
    import wandb
    from wandb.sdk.artifacts._validators import validate_project_name

    try:
        validate_project_name(wandb.Settings(project=project).project)
    except (ValueError, wandb.errors.UsageError):
        with pytest.raises(ConfigError, match=r"logging\.wandb_project"):
            LoggingConfig(wandb="offline", wandb_project=project)
    else:
        LoggingConfig(wandb="offline", wandb_project=project)
    LoggingConfig(wandb="disabled", wandb_project=project)


def test_failed_picture_does_not_affect_the_rest_of_the_run(tmp_path, open_view, capsys):
    def pictures(path):
        raise RuntimeError("no picture today")

    view = open_view("offline", pictures=pictures)
    view.log({"train/step": 1})
    view.close()
    assert "W&B failed (no picture today); the run has no pictures" in capsys.readouterr().out
    assert logged_steps(read_offline(tmp_path)[1]) == ["1"]


def test_f23_killed_wandb_service_loses_at_most_one_second_of_rows(tmp_path, open_view):
    """A scheduler that stops a job also signals W&B's process."""
    view = open_view("offline")
    view.log({"train/step": 1})
    time.sleep(2.5)
    (service,) = [child for child in psutil.Process().children() if child.name() == "wandb-core"]
    service.terminate()
    service.wait(10)
    with pytest.raises(Exception, match=r"Connection lost|abandoned|^$"):
        view.close()
    assert logged_steps(read_offline(tmp_path)[1]) == ["1"]


def test_histogram_is_truncated_to_the_bins_that_wandb_accepts(tmp_path, open_view):
    """Trailing zeros are removed; without a valid histogram, the row is logged anyway."""
    view = open_view("offline")
    many = {"experts_per_token": [0, 3, 1, *[0] * 600], "load": [4] * 602, "active": [1] * 602}
    view.log({"train/step": 1}, {"train/step": 1, "layers": {"0": many}})
    view.log({"train/step": 2}, {"train/step": 2, "layers": {"0": {}}})
    view.close()
    _, rows = read_offline(tmp_path)
    assert json.loads(rows[0]["moe/layer_00/experts_per_token/values"]) == [0, 3, 1]
    assert logged_steps(rows) == ["1", "2"]


@pytest.fixture
def dead_server(monkeypatch):
    """A server that accepts connections and never answers, and an API key for it."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{listener.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        yield


def test_f23_unresponsive_server_delays_the_start_by_ten_seconds(tmp_path, open_view, dead_server, capsys):
    start = time.monotonic()
    view = open_view("online")
    assert time.monotonic() - start < 10
    assert "logging offline" in capsys.readouterr().out
    view.log({"train/step": 1})
    view.close()
    ids, rows = read_offline(tmp_path)
    assert view.run_id in ids
    assert logged_steps(rows) == ["1"]


def test_f23_dead_server_during_a_run_loses_no_step(tmp_path, corpus_dir, monkeypatch):
    """A run of train.py with rows, histograms, pictures and artifacts."""
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    process = TrainingProcess(corpus_dir, tmp_path / "runs", "logging.wandb=online", "train.steps=12")
    assert process.wait() == 0, process.output()
    run = tmp_path / "runs" / "tiny"
    assert "logging offline" in process.output()
    assert "W&B failed" not in process.output()
    _, logged = read_offline(run)
    rows = read_rows(run / "metrics.jsonl")
    assert len(rows) == 12
    offline = [own for own in logged if "train/lm_loss" in own]
    for row, own in zip(rows, offline, strict=True):
        assert {name: float(own[name]) for name in row} == row
    assert [own["train/step"] for own in offline if "moe/load/path" in own] == ["4", "8", "12"]
    assert {f"report/{name}/path" for name in ("loss", "experts_per_token", "load_0", "histogram_0")} <= logged[
        -1
    ].keys()
    assert {"inputs", "checkpoint"} <= artifacts(run).keys()


def give_up_soon(rank: int) -> None:
    """Reduces the wait at the end of a run whose server is gone from a minute to two seconds."""
    from dynmoe.train import wandb_view

    wandb_view._FINISH_TIMEOUT_S = 2.0


@pytest.mark.slow
@pytest.mark.parametrize(
    "vanishes_at",
    [pytest.param(13, id="in the middle"), pytest.param(40, id="at the end")],
)
def test_f23_vanished_server_loses_no_step_and_the_run_can_be_synced_later(
    tmp_path, corpus_dir, undisturbed, vanishes_at
):
    with WandbServer() as server:
        environment = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "0" * 40}
        process = TrainingProcess(
            corpus_dir, tmp_path / "runs", "logging.wandb=online", environment=environment, prepare=give_up_soon
        )
        run = tmp_path / "runs" / "tiny"
        process.wait_for_row(run / "metrics.jsonl", vanishes_at)
        server.vanish()
        assert process.wait() == 0, process.output()
        assert "logging offline" not in process.output()
        (command,) = re.findall(r"; run (wandb sync .*) to complete it", process.output())
        assert curve(run / "metrics.jsonl") == curve(undisturbed[0] / "metrics.jsonl")
        assert parameter_hashes(run, 40) == parameter_hashes(undisturbed[0], 40)
        assert len(server.rows) < 40, "the server vanished too late"

        server.come_back()
        subprocess.run(
            [sys.executable, "-m", *shlex.split(command)], cwd=tmp_path, env=os.environ | environment, check=True,
            timeout=60,
        )  # fmt: skip
        synced = [row for row in server.rows if "train/lm_loss" in row]
        rows = read_rows(run / "metrics.jsonl")
        assert [{name: row[name] for name in own} for row, own in zip(synced, rows, strict=True)] == rows


@pytest.mark.parametrize("key", ["", "short"])
def test_missing_or_malformed_api_key_falls_back_to_offline(tmp_path, open_view, monkeypatch, capsys, key):
    monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    view = open_view("online")
    view.log({"train/step": 1})
    view.close()
    assert "logging offline" in capsys.readouterr().out
    assert logged_steps(read_offline(tmp_path)[1]) == ["1"]


SECRETS = {
    "WANDB_API_KEY": "5ec7e7" * 6 + "f00d",
    "HF_TOKEN": "hf_5ec7e7OfTheHub",
    "AWS_SECRET_ACCESS_KEY": "5ec7e7/Of/The/Bucket",
    "HTTPS_PROXY": "http://user:5ec7e7OfTheProxy@127.0.0.1:9",
}


@pytest.mark.parametrize("remote", ["5ec7e7OfGit:x-oauth-basic@", "user:5ec7e7OfGit@", "5ec7e7OfGit@"])
def test_f25_no_secret_is_written_to_disk(tmp_path, open_view, monkeypatch, remote):
    """No secret of the environment or of the git remote is written; the commit is."""
    repository = tmp_path / "repository"
    repository.mkdir()
    monkeypatch.chdir(repository)
    for arguments in (
        ["init", "-q"], ["remote", "add", "origin", f"https://{remote}127.0.0.1/x.git"],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "first"],
    ):  # fmt: skip
        subprocess.run(["git", *arguments], check=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], check=True, capture_output=True).stdout.strip()
    for name, secret in SECRETS.items():
        monkeypatch.setenv(name, secret)
    view = open_view("offline")
    view.log({"train/step": 1})
    view.close()
    run = tmp_path / "run"
    RunDirectory(run).write_outcome("finished", 1)
    contents = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert {"config.yaml", "outcome.json", "debug.log"} <= {path.name for path in contents}
    assert [path for path, content in contents.items() if b"5ec7e7" in content] == []
    assert any(commit in content for path, content in contents.items() if path.suffix == ".wandb")
