"""Checkpoints that are complete or do not count: write beside, hash, manifest last, rename.

A step's directory is written as ``step_N.tmp-<id>``, its manifest (sizes and SHA-256 of every file) comes last, and
the rename makes it a checkpoint. Loading goes from the newest to the oldest, verifies every hash before anything is
read, and puts a damaged one aside. Directories are never reused.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dynmoe.config import Config
from dynmoe.data.corpus import TOKENIZER, sha256_of
from dynmoe.errors import UserError

_MANIFEST = "manifest.json"
_TRAINER = "trainer.json"
_COMPLETE = re.compile(r"step_\d{8}")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint; verified where it is to be read."""

    path: Path
    step: int

    @property
    def trainer_state(self) -> dict[str, Any]:
        """What the trainer gave to :meth:`CheckpointStore.save`."""
        return json.loads((self.path / _TRAINER).read_text())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replaces ``path`` so that a reader, also after a crash, sees the old content or the new one."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with temporary.open("wb") as stream:
        stream.write(content.encode() if isinstance(content, str) else content)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.rename(path)
    _sync(path.parent)


def _verify(path: Path) -> str | None:
    """What is wrong with a checkpoint directory; None where every file is as its manifest says."""
    try:
        manifest = json.loads((path / _MANIFEST).read_text())
        files = manifest["files"]
        if f"step_{manifest['step']:08d}" != path.name or _TRAINER not in files:
            return f"{_MANIFEST} is not this checkpoint's"
        for name, facts in files.items():
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != facts["bytes"] or sha256_of(file) != facts["sha256"]:
                return f"{name} is damaged"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{_MANIFEST} is missing or damaged"
    return None


def step_directories(root: Path) -> list[Path]:
    """Directories in ``root`` that are named after a step, as complete checkpoints are; newest first."""
    if not root.is_dir():
        return []
    found = [path for path in root.iterdir() if path.is_dir() and _COMPLETE.fullmatch(path.name)]
    return sorted(found, key=lambda path: path.name, reverse=True)


def step_of(path: Path) -> int:
    """The step that such a directory is named after."""
    return int(path.name.removeprefix("step_"))


def _hashes(files: list[Path], root: Path) -> dict[str, dict[str, Any]]:
    """Sizes and hashes for a manifest, of files below ``root`` that have reached the disk with their directories."""
    hashed = {}
    for file in files:
        _sync(file)
        hashed[file.relative_to(root).as_posix()] = {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
    for folder in {file.parent for file in files}:
        _sync(folder)
    return hashed


def _commit(building: Path, final: Path, manifest: dict[str, Any]) -> None:
    """Makes a directory of files a checkpoint: manifest, rename, and a look at what is there then."""
    write_atomically(building / _MANIFEST, json.dumps(manifest, indent=1))
    building.rename(final)
    _sync(final.parent)
    if problem := _verify(final):
        raise OSError(f"{final}: {problem} right after it was written; older checkpoints are kept")


def newest_complete(root: Path) -> Checkpoint | None:
    """The newest complete checkpoint in ``root``, by its name alone: to be referred to, not to be read."""
    return next((Checkpoint(path, step_of(path)) for path in step_directories(root)), None)


def newest_sound(root: Path) -> Checkpoint:
    """The newest undamaged checkpoint in ``root``, which is left as it is; for tools, outside a process group.

    Raises:
        UserError: there is none.
    """
    for path in step_directories(root):
        problem = _verify(path)
        if problem is None:
            return Checkpoint(path, step_of(path))
        print(f"checkpoint {path}: {problem}; trying the one before", flush=True)
    raise UserError(f"{root}: no undamaged checkpoint; name the directory of a run that has one")


def write_run(source: Checkpoint, config: Config, output: Path, write: Callable[[Path], None]) -> None:
    """A new run directory with one checkpoint, which goes on from another run's; for tools, of one process.

    Args:
        source: where the new run goes on from.
        config: of the new run.
        output: its directory, which does not exist; half of one is never left there.
        write: puts all files of the model into the directory it is given.
    """
    state = source.trainer_state
    state["config"] = dataclasses.asdict(config)
    state["progress"]["wandb_id"] = None  # another run
    facts = {"ranks": 1, "parallel": state["config"]["parallel"], "config": config.digest(), "data": state["data"]}
    building = output.with_name(f"{output.name}.tmp-{secrets.token_hex(4)}")
    checkpoint = building / "checkpoints" / source.path.name
    unfinished = checkpoint.with_name(f"{checkpoint.name}.tmp")
    unfinished.mkdir(parents=True)
    try:
        write(unfinished)
        (unfinished / _TRAINER).write_text(json.dumps(state))
        files = sorted(path for path in unfinished.rglob("*") if path.is_file())
        _commit(unfinished, checkpoint, {"step": source.step, **facts, "files": _hashes(files, unfinished)})
        write_atomically(building / "config.yaml", config.to_yaml())
        tokenizer = source.path.parents[1] / TOKENIZER
        if tokenizer.exists():
            write_atomically(building / TOKENIZER, tokenizer.read_bytes())
        building.rename(output)
    except BaseException:
        shutil.rmtree(building)
        raise


class CheckpointStore:
    """The checkpoints of one run, in ``root``. Methods are collective.

    Args:
        root: directory, shared by all ranks.
        keep: newest checkpoints that stay.
    """

    def __init__(self, root: Path, keep: int) -> None:
        self.root, self.keep = root, keep
        self._is_first = dist.get_rank() == 0

    def save(
        self, step: int, write: Callable[[Path], list[Path]], trainer_state: dict[str, Any], facts: dict[str, Any]
    ) -> None:
        """Saves step ``step``: ``write`` puts this rank's files into the directory it is given and returns them.

        ``facts`` go into the manifest, for whoever looks at it: parallel sizes, hashes of configuration and data.
        """
        name = [secrets.token_hex(4)]
        dist.broadcast_object_list(name, src=0)
        final = self.root / f"step_{step:08d}"
        building = final.with_name(f"{final.name}.tmp-{name[0]}")
        if self._is_first:
            building.mkdir(parents=True)
        dist.barrier()
        files = write(building)
        if self._is_first:
            state = building / _TRAINER
            state.write_text(json.dumps(trainer_state))
            files = [*files, state]
        hashed = _hashes(files, building)
        gathered: list[dict[str, Any] | None] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, hashed)
        if self._is_first:
            everything = {name: fact for part in gathered if part for name, fact in part.items()}
            _commit(building, final, {"step": step, **facts, "files": everything})
            self._prune()
        dist.barrier()

    def _prune(self) -> None:
        for old in step_directories(self.root)[self.keep :]:
            # Out of the way first: half a removal must not look like a checkpoint.
            doomed = old.rename(old.with_name(f"{old.name}.removed"))
            shutil.rmtree(doomed)

    def remove_leftovers(self) -> None:
        """Removes what interrupted saves and removals left behind."""
        if self._is_first and self.root.is_dir():
            for pattern in ("step_*.tmp-*", "step_*.removed"):
                for leftover in self.root.glob(pattern):
                    shutil.rmtree(leftover)
        dist.barrier()

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint whose every hash is right; None in a run that has none yet.

        Damaged ones are renamed to ``step_N.damaged-<id>`` and reported.

        Raises:
            UserError: there are checkpoints, and all of them are damaged.
        """
        chosen: list[Any] = [None]
        if self._is_first:
            chosen = [self._choose()]
        dist.broadcast_object_list(chosen, src=0)
        result = chosen[0]
        if isinstance(result, str):
            raise UserError(result)
        return None if result is None else Checkpoint(self.root / f"step_{result:08d}", result)

    def _choose(self) -> int | str | None:
        problems = []
        for path in step_directories(self.root):
            problem = _verify(path)
            if problem is None:
                return step_of(path)
            problems.append(f"{path.name}: {problem}")
            path.rename(path.with_name(f"{path.name}.damaged-{secrets.token_hex(4)}"))
            print(f"checkpoint {path}: {problem}; put aside, trying the one before", flush=True)
        if problems or any(self.root.glob("step_*.damaged-*")):
            why = "; ".join(problems) or "all were found damaged before"
            return f"{self.root}: no checkpoint is undamaged ({why}); restore one, or start anew with another run.name"
        return None
