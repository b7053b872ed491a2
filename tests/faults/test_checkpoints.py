"""F6 to F9, F20, F24 and F27: faults of file systems and checkpoints, and checkpoints with code."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from dynmoe.train.checkpoint import step_directories
from tests.faults.cases import MEGATRON, errors, is_undisturbed
from tests.train.cases import TrainingProcess, read_rows


def limit_files(rank: int, size: int) -> None:
    """Limits the size of files that this process writes, like a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize(
    ("engine", "asynchronous"),
    [
        pytest.param(*way, marks=pytest.mark.slow)
        for way in (("deepspeed", "true"), ("deepspeed", "false"), ("megatron", "true"), ("megatron", "false"))
    ],
)
def test_f06_disk_full_during_checkpoint_write(
    undisturbed, undisturbed_pipeline, corpus_dir, tmp_path, engine, asynchronous
):
    run = tmp_path / "runs" / "tiny"
    overrides = [f"checkpoint.asynchronous={asynchronous}", *(MEGATRON if engine == "megatron" else [])]
    first = TrainingProcess(corpus_dir, tmp_path / "runs", *overrides, "checkpoint.asynchronous=false")
    first.wait_for_row(run / "metrics.jsonl", 18)  # step 10 is saved
    first.kill_tree()
    process = TrainingProcess(corpus_dir, tmp_path / "runs", *overrides, prepare=partial(limit_files, size=100_000))
    assert process.wait() != 0
    (line,) = set(errors(process))
    for part in (str(run / "checkpoints" / "step_00000020.tmp-"), "large", "the previous checkpoint is intact"):
        assert part in line, process.output()
    assert json.loads((run / "outcome.json").read_text())["status"] == "failed"
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_00000010"], (
        "the unfinished checkpoint was not removed"
    )
    last = TrainingProcess(corpus_dir, tmp_path / "runs", *overrides)
    assert last.wait() == 0, last.output()
    is_undisturbed(run, undisturbed_pipeline if engine == "megatron" else undisturbed[0])


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mounts file systems with the given options of ``mount``; needs root."""
    mounted = []

    def make(name: str, *options: str) -> Path:
        path = tmp_path / name
        path.mkdir(exist_ok=True)
        done = subprocess.run(["mount", *options, str(path)], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"cannot mount: {done.stderr.strip()}")
        mounted.append(path)
        return path

    yield make
    for path in reversed(mounted):
        subprocess.run(["umount", str(path)], check=True)


@pytest.mark.faults
def test_f06_file_system_full_at_start(corpus_dir, mount):
    disk = mount("disk", "-t", "tmpfs", "-o", "size=3m", "tmpfs")
    process = TrainingProcess(corpus_dir, disk / "runs", "checkpoint.interval=5", "checkpoint.keep=9")
    assert process.wait() != 0
    (line,) = set(errors(process))
    assert "No space left on device" in line
    assert str(disk / "runs" / "tiny" / "checkpoints") in line
    kept = step_directories(disk / "runs" / "tiny" / "checkpoints")
    assert kept, "the first checkpoint fits"
    subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
    again = TrainingProcess(corpus_dir, disk / "runs", "checkpoint.interval=5", "checkpoint.keep=9")
    assert again.wait() == 0, again.output()


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def garble(path: Path) -> None:
    path.write_text('{"step": [')


CORRUPTIONS = {
    "flipped": (flip, "experts_00001.safetensors"),
    "cut off": (cut, "dense.safetensors"),
    "empty": (empty, "random_00000.safetensors"),
    "missing": (Path.unlink, "experts_00000.safetensors"),
    "state": (flip, "trainer.json"),
    "manifest": (garble, "manifest.json"),
    "no manifest": (Path.unlink, "manifest.json"),
}
MEGATRON_CORRUPTIONS = {
    "flipped": (flip, "megatron/__1_0.distcp"),
    "metadata": (flip, "megatron/.metadata"),
    "common": (cut, "megatron/common.pt"),
    "missing": (Path.unlink, "megatron/__0_0.distcp"),
}
CASES = [("deepspeed", name) for name in CORRUPTIONS] + [("megatron", name) for name in MEGATRON_CORRUPTIONS]


@pytest.mark.parametrize(("engine", "damage"), CASES)
def test_f07_corrupt_checkpoint_is_named_and_the_previous_one_loads(
    undisturbed, undisturbed_pipeline, two_ranks, tmp_path, engine, damage
):
    source = undisturbed_pipeline if engine == "megatron" else undisturbed[0]
    root = tmp_path / "checkpoints"
    shutil.copytree(source / "checkpoints", root)
    harm, name = (MEGATRON_CORRUPTIONS if engine == "megatron" else CORRUPTIONS)[damage]
    harm(root / "step_00000040" / name)
    for found in two_ranks.run(newest_of, str(root)):
        assert found["step"] == 30
    named = name if name != "manifest.json" else "manifest.json is missing, damaged"
    assert named in two_ranks_said(tmp_path)
    assert [path.name[:21] for path in sorted(root.iterdir())] == ["step_00000030", "step_00000040.damaged"]
    harm(root / "step_00000030" / name)
    for found in two_ranks.run(newest_of, str(root)):
        assert "no valid checkpoint" in found["error"]
        assert "step_00000030" in found["error"]
    for found in two_ranks.run(newest_of, str(root)):
        assert "all were quarantined before" in found["error"], "the run must not restart from scratch silently"


def newest_of(root: str) -> dict[str, Any]:
    """The checkpoint that this rank of a pool finds in ``root``; printed messages are written to a file next to it."""
    import contextlib

    from dynmoe.errors import UserError
    from dynmoe.train.checkpoint_store import CheckpointStore

    with (Path(root).parent / "said.txt").open("a") as stream, contextlib.redirect_stdout(stream):
        try:
            checkpoint = CheckpointStore(Path(root), keep=2).newest()
        except UserError as error:
            return {"error": str(error)}
    return {"step": None if checkpoint is None else checkpoint.step}


def newest_where_a_rank_cannot_read(root: str, culprit: int, function: str) -> str:
    """What this rank of a pool raises if the file system fails on rank ``culprit`` in ``function``."""
    import torch.distributed as dist

    from dynmoe.train.checkpoint_store import CheckpointStore

    stale = OSError(errno.ESTALE, "Stale file handle")
    with patch(function, side_effect=stale) if dist.get_rank() == culprit else nullcontext():
        try:
            CheckpointStore(Path(root), keep=2).newest()
        except OSError as error:
            return str(error)
    return "nothing"


@pytest.mark.parametrize(
    ("culprit", "function"),
    [(1, "dynmoe.data.pieces._fill"), (0, "dynmoe.data.pieces._fill"), (0, "pathlib.Path.read_text")],
)
def test_f07_a_checkpoint_that_one_host_cannot_read_stays_as_it_is(undisturbed, two_ranks, tmp_path, culprit, function):
    """The file system of a host has failed, not the checkpoint."""
    root = tmp_path / "checkpoints"
    shutil.copytree(undisturbed[0] / "checkpoints", root)
    first, second = two_ranks.run(newest_where_a_rank_cannot_read, str(root), culprit, function)
    assert first == second
    assert re.fullmatch(
        rf"checkpoint {root}/step_00000040: \S+ cannot be read on \S+ \(Stale file handle\); restart where .*", first
    )
    assert [path.name for path in sorted(root.iterdir())] == ["step_00000030", "step_00000040"]
    assert [found["step"] for found in two_ranks.run(newest_of, str(root))] == [40, 40]


def save_on_a_full_disk(root: str, function: str) -> str:
    """What this rank of a pool raises if rank 0 cannot write in ``function``; afterwards it saves the same state."""
    import torch.distributed as dist

    from dynmoe.engines import make_engine
    from dynmoe.errors import UserError
    from dynmoe.train.checkpoint_store import CheckpointStore
    from tests.engines.cases import VOCAB, config_for

    engine = make_engine(config_for("engine=megatron", "parallel.expert=2"), VOCAB)
    store = CheckpointStore(Path(root), keep=2)
    full = OSError(errno.ENOSPC, "No space left on device")
    make = Path.mkdir

    def make_but_one(path: Path, *arguments: Any, **options: Any) -> None:
        if path.name == "megatron":
            raise full
        make(path, *arguments, **options)

    failing = patch(function, side_effect=full)
    if function == "pathlib.Path.mkdir":
        failing = patch(function, make_but_one)
    said = "nothing"
    with failing if dist.get_rank() == 0 else nullcontext():
        try:
            store.begin(1, engine.snapshot, {"progress": {}, "config": {}, "data": []}, {})
            store.wait()
        except UserError as error:
            said = str(error)
    dist.barrier()
    assert not list(Path(root).iterdir()), "the unfinished checkpoint was not removed"
    dist.barrier()
    store.begin(2, engine.snapshot, {"progress": {}, "config": {}, "data": []}, {})
    store.wait()
    return said


@pytest.mark.parametrize(
    "function",
    [
        "torch.save",
        "pathlib.Path.mkdir",
        "torch.distributed.checkpoint.filesystem.FileSystemWriter.finish",
        "megatron.core.dist_checkpointing.serialization.save_config",
    ],
)
def test_f06_a_small_file_of_megatron_finds_the_disk_full(two_ranks, tmp_path, function):
    """Rank 0 alone writes it, between collectives in which the other ranks wait."""
    root = tmp_path / "checkpoints"
    for said in two_ranks.run(save_on_a_full_disk, str(root), function):
        assert re.fullmatch(r"checkpoint \S+ could not be saved \(rank 0: .*No space left on device.* is intact", said)
    assert [path.name for path in root.iterdir()] == ["step_00000002"]


def two_ranks_said(folder: Path) -> str:
    return (folder / "said.txt").read_text()


@pytest.mark.parametrize("content", ["", "step_00000099", "\x00garbage\n", "../../elsewhere"])
def test_f08_corrupt_latest_pointer_file_is_ignored(undisturbed, two_ranks, tmp_path, content):
    root = tmp_path / "checkpoints"
    root.mkdir()
    for path in step_directories(undisturbed[0] / "checkpoints"):
        os.symlink(path, root / path.name)
    for name in ("latest", "latest_checkpointed_iteration.txt"):
        (root / name).write_text(content)
    assert [found["step"] for found in two_ranks.run(newest_of, str(root))] == [40, 40]
    (root / "step_00000040").unlink()
    assert [found["step"] for found in two_ranks.run(newest_of, str(root))] == [30, 30]


def test_f09_run_directory_is_a_file(corpus_dir, tmp_path):
    (tmp_path / "runs").write_text("a file")
    process = TrainingProcess(corpus_dir, tmp_path / "runs")
    assert process.wait() != 0
    assert [line.split(";")[0] for line in errors(process)] == [
        f"error: run.dir: {tmp_path / 'runs' / 'tiny'} cannot be written (Not a directory)"
    ]


@pytest.mark.slow
def test_f09_second_job_in_the_same_run_directory(corpus_dir, tmp_path):
    first = TrainingProcess(corpus_dir, tmp_path / "runs", "train.steps=100000")
    try:
        first.wait_for_row(tmp_path / "runs" / "tiny" / "metrics.jsonl", 1)
        second = TrainingProcess(corpus_dir, tmp_path / "runs", "train.steps=100000")
        assert second.wait() != 0
        assert "error: run.name: another job trains in" in second.output()
    finally:
        first.kill_tree()


@pytest.mark.faults
def test_f09_run_directory_is_read_only(corpus_dir, mount):
    disk = mount("disk", "-t", "tmpfs", "-o", "ro", "tmpfs")
    process = TrainingProcess(corpus_dir, disk.parent, f"run.dir={disk / 'runs'}")
    assert process.wait() != 0
    (line,) = errors(process)
    assert "Read-only file system" in line
    assert str(disk / "runs") in line


def test_f20_changed_model_on_resume_is_refused_unless_accepted(undisturbed, corpus_dir, tmp_path):
    run = tmp_path / "runs" / "tiny"
    shutil.copytree(undisturbed[0], run)
    changes = ["train.steps=42", "model.moe.experts=8", "adaptation.removal_share=0.7"]
    refused = TrainingProcess(corpus_dir, tmp_path / "runs", *changes)
    assert refused.wait() != 0
    assert errors(refused) == [
        "error: model.moe.experts=8: the run's checkpoint has 4; keep it, start a new run with another run.name, or "
        "name it in checkpoint.accept_changes"
    ]
    assert json.loads((run / "outcome.json").read_text())["status"] == "finished"
    accepted = "checkpoint.accept_changes=[model.moe.experts]"
    misshapen = TrainingProcess(corpus_dir, tmp_path / "runs", *changes, accepted)
    assert misshapen.wait() != 0
    assert "has shape" in errors(misshapen)[0], "tensors that do not fit are refused by name"
    coefficient = ["model.router.simplicity_loss=0.02", "checkpoint.accept_changes=[model.router]"]
    again = TrainingProcess(corpus_dir, tmp_path / "runs", "train.steps=42", *coefficient)
    assert again.wait() == 0, again.output()
    assert [row["train/step"] for row in read_rows(run / "metrics.jsonl")] == list(range(1, 43))


class Bomb:
    """Its pickle creates a directory when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def bytes_of_bomb(path: Path, as_torch: bool) -> bytes:
    import io

    import torch

    if not as_torch:
        return pickle.dumps(Bomb(path))
    stream = io.BytesIO()
    torch.save({"state": Bomb(path)}, stream)
    return stream.getvalue()


def replace_extra_state(folder: Path, bomb: bytes) -> None:
    """Replaces the non-tensor state of a layer by ``bomb``."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    description = pickle.loads((folder / ".metadata").read_bytes())
    index = next(index for index in description.storage_data if "_extra_state" in index.fqn)
    shard = folder / description.storage_data[index].relative_path
    offset = shard.stat().st_size
    with shard.open("ab") as stream:
        stream.write(bomb)
    description.storage_data[index] = _StorageInfo(shard.name, offset, len(bomb))
    (folder / ".metadata").write_bytes(pickle.dumps(description))


@pytest.mark.parametrize("place", [".metadata", "common.pt", "state of a layer"])
def test_f24_checkpoint_with_code_is_not_executed(one_rank, undisturbed_pipeline, tmp_path, place):
    """The hashes may be valid, as an attacker can also write the manifest."""
    checkpoint = tmp_path / "step_00000040"
    shutil.copytree(undisturbed_pipeline / "checkpoints" / checkpoint.name, checkpoint)
    folder = checkpoint / "megatron"
    exploded = tmp_path / "exploded"
    bomb = bytes_of_bomb(exploded, as_torch=place != ".metadata")
    if place == "state of a layer":
        replace_extra_state(folder, bomb)
    else:
        (folder / place).write_bytes(bomb)
    (said,) = one_rank.run(load_and_say, str(undisturbed_pipeline / "config.yaml"), str(checkpoint))
    assert not exploded.exists(), "code of a checkpoint was executed"
    assert "could execute code" in said
    assert len(said.splitlines()) == 1


def load_and_say(config: str, checkpoint: str) -> str:
    """The error of loading a checkpoint in one process."""
    import dataclasses

    from dynmoe.config import load_config
    from dynmoe.config.parallel import ParallelConfig
    from dynmoe.engines.megatron.conversion import to_canonical
    from dynmoe.errors import UserError

    alone = dataclasses.replace(load_config(config), parallel=ParallelConfig())
    try:
        to_canonical(alone, Path(checkpoint), Path(checkpoint).parent)
    except UserError as error:
        return str(error)
    return "nothing was said"


@pytest.mark.slow
def test_f27_checkpoint_directory_not_shared_between_hosts(corpus_dir, tmp_path):
    here = tmp_path / "here"
    elsewhere = tmp_path / "elsewhere"
    here.mkdir()
    process = TrainingProcess(
        corpus_dir, here / "runs", "run.dir=runs", prepare=partial(two_directories, here=here, elsewhere=elsewhere)
    )
    assert process.wait() != 0
    line = errors(process)[0]
    assert f"run.dir: {here / 'runs' / 'tiny' / 'checkpoints'} of rank 0 is not visible to rank 1" in line
    assert "use the absolute path of a directory that all hosts share" in line
    assert not read_rows(here / "runs" / "tiny" / "metrics.jsonl"), "a step was taken"


def two_directories(rank: int, here: Path, elsewhere: Path) -> None:
    """Simulates a second host on which the same path is another directory."""
    elsewhere.mkdir(exist_ok=True)
    os.chdir(elsewhere if rank else here)
