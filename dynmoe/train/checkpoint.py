"""Checkpoints that are complete or do not count: write beside, hash, manifest last, rename.

A step's directory is written as ``step_N.tmp-<id>``, its manifest (sizes and SHA-256 of every file) comes last, and
the rename makes it a checkpoint. Loading goes from the newest to the oldest, verifies every hash before anything is
read, and puts a damaged one aside. Directories are never reused.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from typing import Any

from dynmoe.config import Config
from dynmoe.data.corpus import TOKENIZER, sha256_of
from dynmoe.data.pieces import Piece, first_problem
from dynmoe.errors import UserError

MANIFEST = "manifest.json"
# What an imported checkpoint had beside its weights; see dynmoe.hf.kept.
IMPORTED = "imported"
TRAINER = "trainer.json"
WITHOUT_MANIFEST = f"{MANIFEST} is missing, damaged or not this checkpoint's"
# Beside complete ones, which are named after their step alone.
UNFINISHED, _DAMAGED, _REMOVED = ".tmp-", ".damaged-", ".removed"
_COMPLETE = re.compile(r"step_\d{8}")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint; verified where it is to be read."""

    path: Path
    step: int

    @property
    def trainer_state(self) -> dict[str, Any]:
        """What the trainer gave along: its ``progress``, the run's ``config``, fingerprints of its ``data``.

        Raises:
            UserError: the file is something else.
        """
        path = self.path / TRAINER
        try:
            state = json.loads(path.read_text())
            parts = [type(state[name]) for name in ("progress", "config", "data")]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            parts = []
        if parts != [dict, dict, list]:
            raise UserError(f"checkpoint {path}: is not the state of a run; go on from another checkpoint")
        return state


# Some network and FUSE file systems cannot be asked to bring a directory to the disk.
_NO_SYNC_OF_DIRECTORIES = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)


def _sync(path: Path) -> None:
    """Returns when a file or a directory has reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno in _NO_SYNC_OF_DIRECTORIES):
            raise
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


def _own_hash(manifest: Mapping[str, Any]) -> str:
    content = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest of a checkpoint directory; None where it is missing, damaged or another one's."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        named = manifest["step"] == step_of(path) and TRAINER in manifest["files"]
        named = named and manifest["sha256"] == _own_hash(manifest)
        for name, facts in manifest["files"].items():
            inside = not Path(name).is_absolute() and ".." not in Path(name).parts
            named = named and inside and isinstance(facts["bytes"], int) and isinstance(facts["sha256"], str)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return manifest if named else None


def problem_of(path: Path) -> str | None:
    """What is wrong with a checkpoint directory; None where every file is as its manifest says."""
    manifest = read_manifest(path)
    if manifest is None:
        return WITHOUT_MANIFEST
    return problem_of_files(path, manifest["files"])


def problem_of_files(root: Path, files: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The first of ``files`` (sizes and hashes by name) that is not below ``root`` as it should be, and why."""
    return first_problem(pieces_of(root, files))


def pieces_of(root: Path, files: Mapping[str, Mapping[str, Any]]) -> list[Piece]:
    """The same, to be checked apart."""
    return [
        Piece(root / name, name, 0, facts["bytes"], facts["bytes"], facts["sha256"]) for name, facts in files.items()
    ]


def step_directories(root: Path) -> list[Path]:
    """Directories in ``root`` that are named after a step, as complete checkpoints are; newest first."""
    if not root.is_dir():
        return []
    found = [path for path in root.iterdir() if path.is_dir() and _COMPLETE.fullmatch(path.name)]
    return sorted(found, key=lambda path: path.name, reverse=True)


def step_of(path: Path) -> int:
    """The step that such a directory is named after."""
    return int(path.name.removeprefix("step_"))


def hashes(files: list[Path], root: Path) -> dict[str, dict[str, Any]]:
    """Sizes and hashes for a manifest, of files below ``root`` that have reached the disk with their directories."""
    hashed = {}
    for file in files:
        _sync(file)
        hashed[file.relative_to(root).as_posix()] = {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
    for folder in {file.parent for file in files}:
        _sync(folder)
    return hashed


def commit(building: Path, final: Path, manifest: dict[str, Any]) -> None:
    """Makes a directory of files a checkpoint: by its manifest, which hashes itself too, and then by its name."""
    write_atomically(building / MANIFEST, json.dumps({**manifest, "sha256": _own_hash(manifest)}, indent=1))
    building.rename(final)
    _sync(final.parent)


def remove(path: Path) -> None:
    """Removes a checkpoint: out of the way first, as half a removal must not look like one."""
    rmtree(path.rename(path.with_name(f"{path.name}{_REMOVED}")))


def leftovers(root: Path) -> list[Path]:
    """What saves and removals that were interrupted left in ``root``."""
    return sorted(path for pattern in (f"step_*{UNFINISHED}*", f"step_*{_REMOVED}") for path in root.glob(pattern))


def damaged(root: Path) -> list[Path]:
    """What :func:`put_aside` has renamed in ``root``."""
    return sorted(root.glob(f"step_*{_DAMAGED}*"))


def put_aside(path: Path) -> Path:
    """Renames a damaged checkpoint, so that it is not looked at again; returns where it is then."""
    return path.rename(path.with_name(f"{path.name}{_DAMAGED}{secrets.token_hex(4)}"))


def beyond(paths: Sequence[Path], keep: int, milestones: int) -> list[Path]:
    """Of checkpoint directories, newest first, those that need not stay.

    Args:
        paths: of one run.
        keep: newest ones that stay.
        milestones: those of a step that is a multiple of it stay too; 0: none.
    """
    return [path for path in paths[keep:] if not milestones or step_of(path) % milestones]


def newest_complete(root: Path) -> Checkpoint | None:
    """The newest complete checkpoint in ``root``, by its name alone: to be referred to, not to be read."""
    return next((Checkpoint(path, step_of(path)) for path in step_directories(root)), None)


def newest_sound(root: Path) -> Checkpoint:
    """The newest undamaged checkpoint in ``root``, which is left as it is; for tools, outside a process group.

    Raises:
        UserError: there is none.
    """
    for path in step_directories(root):
        problem = problem_of(path)
        if problem is None:
            return Checkpoint(path, step_of(path))
        print(f"checkpoint {path}: {problem}; trying the one before", flush=True)
    raise UserError(f"{root}: no undamaged checkpoint; name the directory of a run that has one")


def continue_run(source: Checkpoint, config: Config, output: Path, write: Callable[[Path], None]) -> None:
    """A new run directory with one checkpoint, which goes on from another run's; for tools, of one process.

    Args:
        source: where the new run goes on from.
        config: of the new run.
        output: its directory, which does not exist; half of one is never left there.
        write: puts all files of the model into the directory it is given.
    """
    state, files = source.trainer_state, taken_along(source.path.parents[1])
    state["progress"]["wandb_id"] = None  # another run
    write_run(config, output, source.step, state["progress"], state["data"], files, write)


def taken_along(run: Path) -> dict[str, bytes]:
    """Files that belong to the model of a run, by their place in its directory: a run that goes on from it has them."""
    paths = (run / TOKENIZER, *sorted((run / IMPORTED).rglob("*")))
    return {path.relative_to(run).as_posix(): path.read_bytes() for path in paths if path.is_file()}


def write_run(
    config: Config,
    output: Path,
    step: int,
    progress: dict[str, Any],
    data: list[str],
    files: Mapping[str, bytes],
    write: Callable[[Path], None],
) -> None:
    """A new run directory with the checkpoint of ``step``; for tools, of one process.

    Args:
        config: of the run.
        output: its directory, which does not exist; half of one is never left there.
        step: of the checkpoint.
        progress: how far the run has come, as a dictionary.
        data: fingerprints of the corpora it has read.
        files: further ones, by their place in the directory (see :func:`taken_along`).
        write: puts all files of the model into the directory it is given.
    """
    settings = dataclasses.asdict(config)
    facts = {"ranks": 1, "parallel": settings["parallel"], "config": config.digest(), "data": data}
    building = output.with_name(f"{output.name}{UNFINISHED}{secrets.token_hex(4)}")
    checkpoint = building / "checkpoints" / f"step_{step:08d}"
    unfinished = checkpoint.with_name(f"{checkpoint.name}.tmp")
    unfinished.mkdir(parents=True)
    try:
        write(unfinished)
        (unfinished / TRAINER).write_text(json.dumps({"progress": progress, "config": settings, "data": data}))
        written = sorted(path for path in unfinished.rglob("*") if path.is_file())
        commit(unfinished, checkpoint, {"step": step, **facts, "files": hashes(written, unfinished)})
        write_atomically(building / "config.yaml", config.to_yaml())
        for name, content in files.items():
            (building / name).parent.mkdir(parents=True, exist_ok=True)
            write_atomically(building / name, content)
        building.rename(output)
    except BaseException:
        rmtree(building)
        raise
