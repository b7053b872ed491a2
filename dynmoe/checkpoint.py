"""A run's checkpoints, looked at, verified and thinned out: python -m dynmoe.checkpoint list|verify|show|prune RUN"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from shutil import rmtree
from typing import Any

from dynmoe.cli import run_tool
from dynmoe.errors import UserError
from dynmoe.train.checkpoint import (
    Checkpoint,
    beyond,
    damaged,
    leftovers,
    problem_of,
    read_manifest,
    remove,
    step_directories,
    step_of,
)
from dynmoe.train.run_directory import RunDirectory


def describe(root: Path) -> list[str]:
    """A line for each directory of a checkpoint in ``root``, the newest first; nothing is hashed or changed."""
    lines = []
    for path in step_directories(root):
        manifest = read_manifest(path)
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(path.stat().st_mtime))
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        made_by = "no manifest: not a checkpoint" if manifest is None else f"{manifest.get('ranks', '?')} rank(s)"
        lines.append(f"{path.name}  {_size(size):>9}  {when}  {made_by}")
    lines += [f"{path.name}  put aside as damaged" for path in damaged(root)]
    lines += [f"{path.name}  left over from an interrupted save or removal" for path in leftovers(root)]
    return lines


def verify(root: Path, step: int | None = None) -> dict[str, str | None]:
    """What is wrong with each checkpoint in ``root``, or with that of ``step``; None: every hash is right."""
    return {path.name: problem_of(path) for path in _chosen(root, step)}


def show(root: Path, step: int | None = None) -> dict[str, Any]:
    """Manifest and progress of the newest checkpoint in ``root``, or of that of ``step``.

    Raises:
        UserError: it is damaged.
    """
    path = _chosen(root, step)[0]
    if (problem := problem_of(path)) is not None:
        raise UserError(f"checkpoint {path}: {problem}; look at another one with --step")
    manifest, state = read_manifest(path), Checkpoint(path, step_of(path)).trainer_state
    assert manifest is not None
    return {**manifest, "progress": state["progress"], "engine": state["config"]["engine"]}


def prune(run: Path, keep: int, milestones: int, dry: bool) -> list[Path]:
    """Removes all but ``keep`` newest checkpoints and milestones, and what was left over or put aside; says which.

    Args:
        run: directory of a run that nobody trains.
        keep: newest ones that stay, each of them undamaged.
        milestones: those of a step that is a multiple of it stay too; 0: none.
        dry: removes nothing.

    Raises:
        UserError: a job trains in the run, or one of those that would stay is damaged.
    """
    root, directory = run / "checkpoints", RunDirectory(run)
    _chosen(root, None)
    directory.claim()
    try:
        paths = step_directories(root)
        old = beyond(paths, keep, milestones)
        for path in paths[:keep] if old else ():
            if (problem := problem_of(path)) is not None:
                raise UserError(f"checkpoint {path}: {problem}; nothing was removed, as an older one may be needed")
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
        raise UserError(f"{root}: {which}; name the directory of a run that has one")
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
        "list": "a line for each", "verify": "compare every hash", "show": "manifest and progress of one, as JSON",
        "prune": "remove old ones, leftovers and damaged ones",
    }  # fmt: skip
    for name, phrase in phrases.items():
        own = actions.add_parser(name, help=phrase)
        own.add_argument("run", type=Path, metavar="RUN", help="directory of the run")
        if name in ("verify", "show"):
            own.add_argument("--step", type=int, help="that one; default: all, or the newest")
    own.add_argument("--keep", type=int, default=2, help="newest ones that stay (2)")
    own.add_argument("--milestones", type=int, default=0, help="multiples of this step stay too (0: none)")
    own.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    given = parser.parse_args()
    root = given.run / "checkpoints"
    if given.action == "list":
        _chosen(root, None)
        print("\n".join(describe(root)))
    elif given.action == "verify":
        found = verify(root, given.step)
        print("\n".join(f"{name}: {problem or 'sound'}" for name, problem in found.items()))
        if bad := [name for name, problem in found.items() if problem]:
            raise UserError(f"{root}: {', '.join(bad)} cannot be read; training goes on from the newest sound one")
    elif given.action == "show":
        print(json.dumps(show(root, given.step), indent=1))
    else:
        if given.keep < 1 or given.milestones < 0:
            raise UserError(
                f"--keep={given.keep} --milestones={given.milestones}: keep 1 or more, milestones 0 or more"
            )
        for path in prune(given.run, given.keep, given.milestones, given.dry_run):
            print(f"{'would remove' if given.dry_run else 'removed'} {path.name}")


if __name__ == "__main__":
    run_tool(main)
