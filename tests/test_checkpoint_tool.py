"""The output and the removals of python -m dynmoe.checkpoint."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest

from dynmoe import checkpoint
from dynmoe.data.pieces import UnreadableError
from dynmoe.errors import UserError
from dynmoe.train.checkpoint import read_manifest
from dynmoe.train.run_directory import RunDirectory


@pytest.fixture
def run(undisturbed, tmp_path) -> Path:
    """A run whose checkpoints 30 and 40 are valid and 10 and 20 are not, with the leftovers of faults."""
    run = tmp_path / "tiny"
    shutil.copytree(undisturbed[0], run)
    root = run / "checkpoints"
    for step in (10, 20):
        shutil.copytree(root / "step_00000030", root / f"step_{step:08d}")
    (root / "step_00000050.tmp-abc").mkdir()
    (root / "step_00000045.damaged-abc").mkdir()
    return run


def command(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["checkpoint", *arguments])
    checkpoint.main()


def test_list_shows_every_directory(run, monkeypatch, capsys):
    command(monkeypatch, "list", str(run))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [
        "step_00000040", "step_00000030", "step_00000020", "step_00000010", "step_00000045.damaged-abc",
        "step_00000050.tmp-abc",
    ]  # fmt: skip
    assert "2 rank(s)" in lines[0]
    assert "not a checkpoint" in lines[2], "its manifest belongs to another checkpoint"
    assert "quarantined as corrupt" in lines[4]
    assert "leftover of an interrupted" in lines[5]


def test_verify_names_corrupt_files_and_fails(run, monkeypatch, capsys):
    command(monkeypatch, "verify", str(run), "--step", "40")
    assert capsys.readouterr().out == "step_00000040: valid\n"
    (run / "checkpoints" / "step_00000040" / "dense.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="step_00000040, step_00000020, step_00000010 cannot be loaded"):
        command(monkeypatch, "verify", str(run))
    said = capsys.readouterr().out
    assert "step_00000040: dense.safetensors is damaged" in said
    assert "step_00000030: valid" in said


def test_checkpoints_that_cannot_be_read_have_a_line_like_the_others(run, monkeypatch, capsys):
    def fail(path):
        if path.name == "step_00000040":
            raise UnreadableError.of(str(path), OSError(errno.ESTALE, "Stale file handle"))
        return read_manifest(path)

    monkeypatch.setattr("dynmoe.checkpoint.read_manifest", fail)
    monkeypatch.setattr("dynmoe.train.checkpoint.read_manifest", fail)
    command(monkeypatch, "list", str(run))
    lines = capsys.readouterr().out.splitlines()
    assert "cannot be read on" in lines[0]
    assert "2 rank(s)" in lines[1]
    with pytest.raises(UserError, match="step_00000040"):
        command(monkeypatch, "verify", str(run))
    said = capsys.readouterr().out
    assert "step_00000040: checkpoint " in said
    assert "step_00000030: valid" in said


def test_show_gives_manifest_and_progress_of_one_checkpoint(run):
    shown = checkpoint.show(run / "checkpoints")
    assert (shown["step"], shown["ranks"], shown["engine"]) == (40, 2, "deepspeed")
    assert shown["progress"]["samples"] == 160
    assert checkpoint.show(run / "checkpoints", 30)["progress"]["step"] == 30
    with pytest.raises(UserError, match="no checkpoint of step 31"):
        checkpoint.show(run / "checkpoints", 31)
    with pytest.raises(UserError, match="choose another one"):
        checkpoint.show(run / "checkpoints", 20)


def test_prune_keeps_the_latest_checkpoints_and_milestones(run, monkeypatch, capsys):
    root = run / "checkpoints"
    before = sorted(path.name for path in root.iterdir())
    command(monkeypatch, "prune", str(run), "--keep", "1", "--milestones", "20", "--dry-run")
    assert sorted(path.name for path in root.iterdir()) == before
    assert capsys.readouterr().out.splitlines()[0] == "would remove step_00000030"
    command(monkeypatch, "prune", str(run), "--keep", "1", "--milestones", "20")
    assert sorted(path.name for path in root.iterdir()) == ["step_00000020", "step_00000040"]


def test_prune_removes_nothing_while_a_job_trains_or_a_kept_checkpoint_is_corrupt(run):
    root = run / "checkpoints"
    before = sorted(path.name for path in root.iterdir())
    holder = RunDirectory(run)
    holder.claim()
    with pytest.raises(UserError, match="another job trains in"):
        checkpoint.prune(run, 1, 0, dry=False)
    holder.release()
    (root / "step_00000040" / "trainer.json").unlink()
    with pytest.raises(UserError, match="nothing was removed"):
        checkpoint.prune(run, 1, 0, dry=False)
    assert sorted(path.name for path in root.iterdir()) == before


def test_a_directory_without_checkpoints_is_refused_by_name(tmp_path, monkeypatch):
    for action in ("list", "verify", "show", "prune"):
        with pytest.raises(UserError, match="no checkpoint; name a run directory that has one"):
            command(monkeypatch, action, str(tmp_path))
    assert list(tmp_path.iterdir()) == [], "no file was created"
