"""Lists, verifies, shows and prunes the checkpoints of a run: python -m dynmoe.checkpoint list|verify|show|prune RUN"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from shutil import rmtree
from typing import Any

from dynmoe.cli import run_tool
from dynmoe.data.pieces import UnreadableError
from dynmoe.errors import UserError
from dynmoe.train.checkpoint import (
    Checkpoint,
    checkpoints_to_prune,
    damaged,
    find_corruption,
    leftovers,
    read_manifest,
    remove,
    step_directories,
    step_of,
)
from dynmoe.train.run_directory import RunDirectory


def describe(root: Path) -> list[str]:
    """One line for each checkpoint directory in ``root``, newest first, without hashing any file."""
    lines = []
    for path in step_directories(root):
        try:
            manifest = read_manifest(path)
            made_by = (
                "no valid manifest: not a checkpoint" if manifest is None else f"{manifest.get('ranks', '?')} rank(s)"
            )
        except UnreadableError as error:
            made_by = str(error)
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(path.stat().st_mtime))
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        lines.append(f"{path.name}  {_size(size):>9}  {when}  {made_by}")
    lines += [f"{path.name}  quarantined as corrupt" for path in damaged(root)]
    lines += [f"{path.name}  leftover of an interrupted save or removal" for path in leftovers(root)]
    return lines


def verify(root: Path, step: int | None = None) -> dict[str, str | None]:
    """The corruption found in each checkpoint in ``root``, or in that of ``step``; None if all hashes match."""
    found: dict[str, str | None] = {}
    for path in _chosen(root, step):
        try:
            found[path.name] = find_corruption(path)
        except UserError as error:  # it cannot be read; the others may
            found[path.name] = str(error)
    return found


def show(root: Path, step: int | None = None) -> dict[str, Any]:
    """Manifest and progress of the latest checkpoint in ``root``, or of the one of ``step``.

    Raises:
        UserError: the checkpoint is corrupt.
    """
    path = _chosen(root, step)[0]
    if (problem := find_corruption(path)) is not None:
        raise UserError(f"checkpoint {path}: {problem}; choose another one with --step")
    manifest = read_manifest(path)
    state = Checkpoint(path, step_of(path)).trainer_state
    assert manifest is not None
    return {**manifest, "progress": state["progress"], "engine": state["config"]["engine"]}


def prune(run: Path, keep: int, milestones: int, dry: bool) -> list[Path]:
    """Removes old checkpoints, leftovers and quarantined checkpoints; returns their paths.

    Args:
        run: directory of a run that is not being trained.
        keep: number of latest checkpoints to keep; all of them must be valid.
        milestones: checkpoints at multiples of this step are kept too; 0: none.
        dry: only returns the paths.

    Raises:
        UserError: a job is training in the run, or a checkpoint to be kept is corrupt.
    """
    root = run / "checkpoints"
    directory = RunDirectory(run)
    _chosen(root, None)
    directory.claim()
    try:
        paths = step_directories(root)
        old = checkpoints_to_prune(paths, keep, milestones)
        for path in paths[:keep] if old else ():
            if (problem := find_corruption(path)) is not None:
                raise UserError(f"checkpoint {path}: {problem}; nothing was removed, since an older one may be needed")
        rest = [*leftovers(root), *damaged(root)]
        for path in () if dry else old:
            remove(path)
        for path in () if dry else rest:
            rmtree(path)
    finally:
        directory.release()
    return [*old, *rest]


def _chosen(root: Path, step: int | None) -> Sequence[Path]:
    paths = [path for path in step_directories(root) if step is None or step_of(path) == step]
    if not paths:
        which = "no checkpoint" if step is None else f"no checkpoint of step {step}"
        raise UserError(f"{root}: {which}; name a run directory that has one")
    return paths


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def main() -> None:
    parser = argparse.ArgumentParser("python -m dynmoe.checkpoint", description=__doc__)
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    phrases = {
        "list": "print one line for each checkpoint", "verify": "verify the hash of every file",
        "show": "print manifest and progress of a checkpoint as JSON",
        "prune": "remove old checkpoints, leftovers and quarantined checkpoints",
    }  # fmt: skip
    for name, phrase in phrases.items():
        own = actions.add_parser(name, help=phrase)
        own.add_argument("run", type=Path, metavar="RUN", help="run directory")
        if name in ("verify", "show"):
            own.add_argument("--step", type=int, help="only this step (default of verify: all; of show: the latest)")
    own.add_argument("--keep", type=int, default=2, help="number of latest checkpoints to keep (default: 2)")
    own.add_argument("--milestones", type=int, default=0, help="also keep multiples of this step (default: none)")
    own.add_argument("--dry-run", action="store_true", help="only print what would be removed")
    given = parser.parse_args()
    root = given.run / "checkpoints"
    if given.action == "list":
        _chosen(root, None)
        print("\n".join(describe(root)))
    elif given.action == "verify":
        found = verify(root, given.step)
        print("\n".join(f"{name}: {problem or 'valid'}" for name, problem in found.items()))
        if bad := [name for name, problem in found.items() if problem]:
            raise UserError(f"{root}: {', '.join(bad)} cannot be loaded; training resumes from the latest valid one")
    elif given.action == "show":
        print(json.dumps(show(root, given.step), indent=1))
    else:
        if given.keep < 1 or given.milestones < 0:
            options = f"--keep={given.keep} --milestones={given.milestones}"
            raise UserError(f"{options}: out of range; use --keep of at least 1 and --milestones of at least 0")
        for path in prune(given.run, given.keep, given.milestones, given.dry_run):
            print(f"{'would remove' if given.dry_run else 'removed'} {path.name}")


if __name__ == "__main__":
    run_tool(main)
