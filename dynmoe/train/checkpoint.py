"""Atomic checkpoints: a checkpoint is complete, or it does not exist.

The directory is written as ``step_N.tmp-<id>``. Its manifest (size and SHA-256 of every file) is written last, and
renaming the directory commits the checkpoint. Loading tries checkpoints from the latest to the oldest, verifies every
hash before reading any state, and quarantines corrupt checkpoints. Directories are never reused.
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
from dynmoe.data.corpus import sha256_of
from dynmoe.data.pieces import NO_SUCH_FILE, Piece, UnreadableError, first_problem
from dynmoe.data.tokenizer_files import TOKENIZER_FILES
from dynmoe.errors import UserError

MANIFEST = "manifest.json"
# Folder of a run with the files that an imported checkpoint had next to its weights; see dynmoe.hf.kept.
IMPORTED = "imported"
TRAINER = "trainer.json"
WITHOUT_MANIFEST = f"{MANIFEST} is missing, damaged or not this checkpoint's"
# Suffixes of directories that are not complete checkpoints.
UNFINISHED = ".tmp-"
_DAMAGED = ".damaged-"
_REMOVED = ".removed"
_COMPLETE = re.compile(r"step_\d{8}")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint. Whoever finds it for reading verifies it."""

    path: Path
    step: int

    @property
    def trainer_state(self) -> dict[str, Any]:
        """State of the trainer: ``progress``, ``config`` of the run, and fingerprints of its ``data``.

        Raises:
            UserError: the file is not a trainer state.
        """
        path = self.path / TRAINER
        try:
            state = json.loads(path.read_text())
            parts = [type(state[name]) for name in ("progress", "config", "data")]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            parts = []
        if parts != [dict, dict, list]:
            raise UserError(f"checkpoint {path}: is not a trainer state; resume from another checkpoint")
        return state


# Errors of network and FUSE file systems that cannot sync a directory.
_NO_SYNC_OF_DIRECTORIES = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)


def _sync(path: Path) -> None:
    """Flushes a file or a directory to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno in _NO_SYNC_OF_DIRECTORIES):
            raise
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replaces ``path`` atomically: after a crash it has either the old or the new content."""
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
    """The manifest of a checkpoint directory; None if it is missing, corrupt or of another checkpoint.

    Raises:
        UnreadableError: it cannot be read.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        valid = manifest["step"] == step_of(path) and TRAINER in manifest["files"]
        valid = valid and manifest["sha256"] == _own_hash(manifest)
        for name, facts in manifest["files"].items():
            inside = not Path(name).is_absolute() and ".." not in Path(name).parts
            valid = valid and inside and isinstance(facts["bytes"], int) and isinstance(facts["sha256"], str)
    except (*NO_SUCH_FILE, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    except OSError as error:
        raise UnreadableError.of(str(path / MANIFEST), error) from None
    return manifest if valid else None


def find_corruption(path: Path) -> str | None:
    """Describes the corruption of a checkpoint directory; None if every file matches the manifest. For tools.

    Raises:
        UserError: a file cannot be read.
    """
    try:
        manifest = read_manifest(path)
        return WITHOUT_MANIFEST if manifest is None else find_corrupt_file(path, manifest["files"])
    except UnreadableError as error:
        raise UserError(f"checkpoint {path}: {error}; make it readable") from None


def find_corrupt_file(root: Path, files: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Describes the first of ``files`` (sizes and hashes by name) that does not match below ``root``, if any.

    Raises:
        UnreadableError: one of them cannot be read.
    """
    return first_problem(pieces_of(root, files))


def pieces_of(root: Path, files: Mapping[str, Mapping[str, Any]]) -> list[Piece]:
    """The ``files`` below ``root`` as pieces to be verified."""
    return [
        Piece(root / name, name, 0, facts["bytes"], facts["bytes"], facts["sha256"]) for name, facts in files.items()
    ]


def step_directories(root: Path) -> list[Path]:
    """Directories in ``root`` with the name of a complete checkpoint, ``step_N``; latest first."""
    if not root.is_dir():
        return []
    found = [path for path in root.iterdir() if path.is_dir() and _COMPLETE.fullmatch(path.name)]
    return sorted(found, key=lambda path: path.name, reverse=True)


def step_of(path: Path) -> int:
    """The step in the name of such a directory."""
    return int(path.name.removeprefix("step_"))


def hashes(files: list[Path], root: Path) -> dict[str, dict[str, Any]]:
    """Flushes files below ``root`` and their directories to disk; returns sizes and hashes for a manifest."""
    hashed = {}
    for file in files:
        _sync(file)
        hashed[file.relative_to(root).as_posix()] = {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
    for folder in {file.parent for file in files}:
        _sync(folder)
    return hashed


def commit(building: Path, final: Path, manifest: dict[str, Any]) -> None:
    """Turns a directory into a checkpoint: writes the manifest with its own hash, then renames the directory."""
    write_atomically(building / MANIFEST, json.dumps({**manifest, "sha256": _own_hash(manifest)}, indent=1))
    building.rename(final)
    _sync(final.parent)


def remove(path: Path) -> None:
    """Removes a checkpoint. It is renamed first, so that an interrupted removal does not look like a checkpoint."""
    rmtree(path.rename(path.with_name(f"{path.name}{_REMOVED}")))


def leftovers(root: Path) -> list[Path]:
    """Directories in ``root`` that interrupted saves and removals left behind."""
    return sorted(path for pattern in (f"step_*{UNFINISHED}*", f"step_*{_REMOVED}") for path in root.glob(pattern))


def damaged(root: Path) -> list[Path]:
    """Quarantined checkpoints in ``root``."""
    return sorted(root.glob(f"step_*{_DAMAGED}*"))


def quarantine(path: Path) -> Path:
    """Renames a corrupt checkpoint, so that it is not loaded; returns its new path."""
    return path.rename(path.with_name(f"{path.name}{_DAMAGED}{secrets.token_hex(4)}"))


def checkpoints_to_prune(paths: Sequence[Path], keep: int, milestones: int) -> list[Path]:
    """The checkpoints of a run that may be removed.

    Args:
        paths: checkpoint directories of the run, latest first.
        keep: number of latest checkpoints to keep.
        milestones: checkpoints at multiples of this step are kept too; 0: none.
    """
    return [path for path in paths[keep:] if not milestones or step_of(path) % milestones]


def latest_complete(root: Path) -> Checkpoint | None:
    """The latest complete checkpoint in ``root``, not verified: for references to it, not for reading it."""
    return next((Checkpoint(path, step_of(path)) for path in step_directories(root)), None)


def latest_valid(root: Path) -> Checkpoint:
    """The latest valid checkpoint in ``root``. Corrupt ones are not quarantined. For tools without a process group.

    Raises:
        UserError: there is none.
    """
    for path in step_directories(root):
        problem = find_corruption(path)
        if problem is None:
            return Checkpoint(path, step_of(path))
        print(f"checkpoint {path}: {problem}; trying the previous one", flush=True)
    raise UserError(f"{root}: no valid checkpoint; name a run directory that has one")


def continue_run(source: Checkpoint, config: Config, output: Path, write: Callable[[Path], None]) -> None:
    """Creates a run that resumes from a checkpoint of another run. For tools with one process.

    Args:
        source: the checkpoint of the other run.
        config: configuration of the new run.
        output: directory of the new run, which must not exist; it is created atomically.
        write: writes all files of the model into the given directory.
    """
    state = source.trainer_state
    state["progress"]["wandb_id"] = None  # a new run for W&B
    write_run(config, output, source.step, state["progress"], state["data"], model_files(source.path.parents[1]), write)


def model_files(run: Path) -> dict[str, bytes]:
    """Contents of the files that a run passes on with its model, by their path in the run directory."""
    paths = (*(run / name for name in TOKENIZER_FILES), *sorted((run / IMPORTED).rglob("*")))
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
    """Creates a run with one checkpoint. For tools with one process.

    Args:
        config: configuration of the run.
        output: directory of the run, which must not exist; it is created atomically.
        step: step of the checkpoint.
        progress: progress of the run as a dictionary.
        data: fingerprints of the corpora that the run has read.
        files: contents of further files, by their path in the directory (see :func:`model_files`).
        write: writes all files of the model into the given directory.
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
