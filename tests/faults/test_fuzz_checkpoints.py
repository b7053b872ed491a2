"""Fuzzing for F7 and F24: a checkpoint is read as written, or refused in one line."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save
from torch import nn

from dynmoe.checkpoint import describe, show, verify
from dynmoe.config import Config, load_config
from dynmoe.engines.canonical_state import load_weights
from dynmoe.engines.megatron.safe_loading import tensors_only
from dynmoe.engines.state_names import MASTER, parameter_key
from dynmoe.errors import UserError
from dynmoe.train.accounting import Progress
from dynmoe.train.checkpoint import (
    MANIFEST,
    TRAINER,
    Checkpoint,
    commit,
    hashes,
    latest_valid,
)
from dynmoe.train.resume import check_unchanged
from tests.faults.hostile import JSON, attempt, damaged, fuzz


@pytest.fixture(scope="module")
def config() -> Config:
    return load_config(None, ["run.name=a"])


@pytest.fixture(scope="module")
def content(config) -> dict[str, bytes]:
    """The files of a checkpoint except the manifest."""
    module = nn.Linear(3, 2)
    tensors = {parameter_key(name, MASTER): value.detach() for name, value in module.named_parameters()}
    state = {"progress": dataclasses.asdict(Progress(step=2)), "config": dataclasses.asdict(config), "data": ["f" * 64]}
    return {TRAINER: json.dumps(state).encode(), "dense.safetensors": save(tensors)}


def write(root: Path, step: int, content: dict[str, bytes]) -> Path:
    """Writes a checkpoint of these files with valid hashes."""
    building = root / "building"
    final = root / f"step_{step:08d}"
    building.mkdir(parents=True)
    for name, own in content.items():
        (building / name).write_bytes(own)
    files = hashes([building / name for name in content], building)
    commit(building, final, {"step": step, "ranks": 1, "files": files})
    return final


@fuzz(50)
@given(data=st.data())
def test_f07_fuzz_corrupt_checkpoints(tmp_path, content, data):
    """A checkpoint found valid is bitwise as written, including its manifest; otherwise the older one is found."""
    root = tmp_path / "checkpoints"
    shutil.rmtree(root, ignore_errors=True)
    older, newer = (write(root, step, content) for step in (1, 2))
    written = {path.name: path.read_bytes() for path in newer.iterdir()}
    others = st.sampled_from(sorted(written)).map(written.__getitem__)
    for name in data.draw(st.lists(st.sampled_from(sorted(written)), min_size=1, max_size=2, unique=True)):
        hit = data.draw(st.none() | damaged(written[name]) | others)
        if hit is None:
            (newer / name).unlink()
        else:
            (newer / name).write_bytes(hit)
    found = attempt(lambda: latest_valid(root))
    for look in (describe, show, verify):
        attempt(lambda look=look: look(root))
    assert found is not None
    if found.step == 2:
        manifests = json.loads(written.pop(MANIFEST)), json.loads((newer / MANIFEST).read_bytes())
        assert manifests[0] == manifests[1]
        assert {name: (newer / name).read_bytes() for name in written} == written
    else:
        assert found.path == older


@fuzz(50)
@given(data=st.data())
def test_f24_fuzz_trainer_states_with_valid_hashes(tmp_path, config, content, data):
    """With a manifest that matches the files, the state read from them is usable, or they are refused."""
    shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)
    state = json.loads(content[TRAINER])
    progress = state["progress"]
    part = data.draw(st.sampled_from((state, progress, progress["guard"], state["config"])))
    key = data.draw(st.sampled_from(sorted(part)) | st.text(max_size=4))
    if data.draw(st.booleans()):
        part[key] = data.draw(JSON)
    else:
        part.pop(key, None)
    written = data.draw(st.just(json.dumps(state).encode()) | damaged(content[TRAINER]))
    checkpoint = Checkpoint(write(tmp_path / "checkpoints", 2, {**content, TRAINER: written}), 2)

    def resume() -> Progress:
        found = checkpoint.trainer_state
        check_unchanged(found["config"], dataclasses.asdict(config))
        return Progress.of(found["progress"])

    progress = attempt(resume)
    if progress is not None:
        assert progress.step + progress.samples + progress.guard.bad_in_a_row >= 0
        json.dumps(dataclasses.asdict(progress))


@fuzz(50)
@given(data=st.data())
def test_f24_fuzz_tensor_files_with_valid_hashes(tmp_path, content, data):
    name = "dense.safetensors"
    (tmp_path / name).write_bytes(data.draw(damaged(content[name])))
    module = nn.Linear(3, 2)
    attempt(lambda: load_weights(tmp_path, module, []))


@pytest.fixture(scope="module")
def description(tmp_path_factory) -> bytes:
    folder = tmp_path_factory.mktemp("described")
    dcp.save({"weight": torch.ones(2), "state": io.BytesIO(b"7")}, checkpoint_id=folder, no_dist=True)
    return (folder / ".metadata").read_bytes()


@fuzz(50)
@given(data=st.data())
def test_f24_fuzz_megatron_metadata_with_valid_hashes(tmp_path, description, data):
    """Megatron's metadata file is a pickle."""
    words = (b"cposix\nsystem\n", b"\x8c\x05posix\x8c\x06system\x93", b"R", b"\x81", b"b", b".")
    (tmp_path / ".metadata").write_bytes(data.draw(damaged(description, words)))

    def read() -> None:
        with tensors_only(tmp_path):
            pass

    attempt(read)


def test_f24_megatron_metadata_that_requests_huge_memory_is_refused(tmp_path):
    """Found by fuzzing: six bytes with an index for which unpickling allocates gigabytes."""
    (tmp_path / ".metadata").write_bytes(b"\x80\x02Nr\x00\x00\x00\x40.")
    with pytest.raises(UserError, match="is not valid tensor metadata"), tensors_only(tmp_path):
        pass
