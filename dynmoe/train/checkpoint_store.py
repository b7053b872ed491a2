"""Checkpoints of a training run: saved asynchronously, committed by all ranks together.

A save is a sequence of jobs. Every rank runs each job on a thread, without collectives. The next job starts when all
ranks have finished, which they communicate between two steps. So no collective runs concurrently with a step. A
synchronous save is the same sequence, waited for.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dynmoe.data.pieces import Checking
from dynmoe.errors import UserError, first_line
from dynmoe.train.background import BackgroundJob, Job
from dynmoe.train.checkpoint import (
    TRAINER,
    UNFINISHED,
    WITHOUT_MANIFEST,
    Checkpoint,
    checkpoints_to_prune,
    commit,
    damaged,
    find_corrupt_file,
    hashes,
    leftovers,
    pieces_of,
    quarantine,
    read_manifest,
    remove,
    step_directories,
    step_of,
)
from dynmoe.train.engine import Snapshot
from dynmoe.train.verification import check_together, gather_ranks, share
from dynmoe.train.write_failures import recurs

# Time until a file that another host has created must be visible on a network file system.
_VISIBLE_S = 5.0


class CheckpointStore:
    """The checkpoints of one run, in ``root``. Methods are collective unless documented as local.

    Args:
        root: directory, shared by all ranks.
        keep: number of latest checkpoints to keep.
        milestones: checkpoints at multiples of this step are kept too; 0: none.
    """

    def __init__(self, root: Path, keep: int, milestones: int = 0) -> None:
        self.root = root
        self.keep = keep
        self.milestones = milestones
        self._is_first = dist.get_rank() == 0
        self._jobs: Generator[Job, Any, None] | None = None
        self._work: BackgroundJob | None = None
        self._building = root

    def begin(
        self, step: int, snapshot: Callable[[Path], Snapshot], trainer_state: dict[str, Any], facts: dict[str, Any]
    ) -> None:
        """Starts saving the current state as step ``step``, after waiting for an earlier save.

        Args:
            step: step of the checkpoint.
            snapshot: takes the engine's snapshot, given the directory to write into.
            trainer_state: the rest of the run's state; that of rank 0 is written.
            facts: further entries of the manifest: parallel sizes, hashes of configuration and data.

        Raises:
            UserError: the directory cannot be written to, or the earlier save failed.
        """
        self.wait()
        name = [secrets.token_hex(4)]
        dist.broadcast_object_list(name, src=0)
        final = self.root / f"step_{step:08d}"
        self._building = final.with_name(f"{final.name}{UNFINISHED}{name[0]}")
        self._together(lambda: self._building.mkdir(parents=True) if self._is_first else None)
        made = snapshot(self._building)
        self._jobs = self._save(final, made, json.dumps(trainer_state), {"step": step, **facts})
        self._work = BackgroundJob(next(self._jobs))

    def _save(self, final: Path, snapshot: Snapshot, trainer_state: str, manifest: dict[str, Any]) -> Generator[Job]:
        """Yields the jobs of a save in order; the code between the jobs is collective."""
        building = self._building

        def write() -> dict[str, dict[str, Any]]:
            files = snapshot.write()
            if self._is_first:
                (building / TRAINER).write_text(trainer_state)
                files = [*files, building / TRAINER]
            return hashes(files, building)

        own = yield write
        own |= self._together(lambda: hashes(snapshot.finish(), building))
        files = {name: facts for part in gather_ranks(own) for name, facts in part.items()}
        yield (lambda: commit(building, final, {**manifest, "files": files})) if self._is_first else _no_job

        def verify() -> None:
            if problem := find_corrupt_file(final, own):
                raise OSError(f"{final}: {problem} immediately after writing; older checkpoints are kept")

        yield verify
        yield self._prune if self._is_first else _no_job

    @property
    def saving(self) -> bool:
        """Whether a save is in progress; local, the same on every rank."""
        return self._work is not None

    @property
    def busy(self) -> bool:
        """Whether this rank is running a job; local."""
        return self._work is not None and self._work.is_running

    def advance(self) -> None:
        """Starts the next job of the save; to be called when no rank is busy.

        Raises:
            UserError: a rank could not write, and a restart would not help.
            OSError: a rank could not write.
        """
        assert self._work is not None
        assert self._jobs is not None
        self._work.wait()
        done = self._work
        self._work = None
        self._agree(done.error)
        with contextlib.suppress(StopIteration):
            self._work = BackgroundJob(self._jobs.send(done.result))

    def wait(self) -> None:
        """Completes a save that is in progress; raises the same errors as :meth:`advance`."""
        while self.saving:
            self.advance()

    def _together(self, action: Callable[[], Any]) -> Any:
        """Runs ``action`` on every rank; raises on all ranks if it fails on any of them."""
        result = None
        failure = None
        try:
            result = action()
        except Exception as error:
            failure = error
        self._agree(failure)
        return result

    def _agree(self, failure: Exception | None) -> None:
        """Raises on all ranks if any rank reports a failure."""
        own = None if failure is None else (first_line(failure), recurs(failure, self.root))
        failed = [(rank, *report) for rank, report in enumerate(gather_ranks(own)) if report is not None]
        if not failed:
            return
        if self._is_first and self._building != self.root:
            shutil.rmtree(self._building, ignore_errors=True)  # frees space on a full disk
        rank, text, _ = failed[0]
        problem = f"checkpoint {self._building} could not be saved (rank {rank}: {text})"
        if any(persistent for _, _, persistent in failed):
            cure = "free disk space or fix the permissions, and restart"
            raise UserError(f"{problem}; {cure}: the previous checkpoint is intact")
        raise OSError(problem) from failure

    def _prune(self) -> None:
        for old in checkpoints_to_prune(step_directories(self.root), self.keep, self.milestones):
            _try_to_remove(old, remove)

    def check_shared(self) -> None:
        """Checks that all ranks see the same directory; otherwise each host would save a part of the checkpoint.

        Raises:
            UserError: names the ranks that see another directory.
        """
        mark = [f".shared-{secrets.token_hex(4)}"]
        dist.broadcast_object_list(mark, src=0)
        path = self.root / mark[0]

        def create() -> None:
            self.root.mkdir(parents=True, exist_ok=True)
            path.touch()

        self._together(create if self._is_first else _no_job)
        deadline = time.monotonic() + _VISIBLE_S
        while not (seen := path.exists()) and time.monotonic() < deadline:
            time.sleep(0.1)
            with contextlib.suppress(OSError):
                os.listdir(self.root)  # network file systems cache that a file is missing
        everywhere = gather_ranks(None if seen else socket.gethostname())
        if self._is_first:
            path.unlink()
        blind = [f"{rank} (on {host})" for rank, host in enumerate(everywhere) if host is not None]
        if blind:
            problem = f"{self.root.resolve()} of rank 0 is not visible to rank {', '.join(blind)}"
            raise UserError(f"run.dir: {problem}; use the absolute path of a directory that all hosts share")

    def remove_leftovers(self) -> None:
        """Removes the leftovers of interrupted saves and removals."""
        if self._is_first:
            for leftover in leftovers(self.root):
                _try_to_remove(leftover, shutil.rmtree)
        dist.barrier()

    def newest(self, progress: Callable[[str], None] = lambda doing: None) -> Checkpoint | None:
        """The latest valid checkpoint; None if the run has no checkpoint yet. Each rank verifies a share of the files.

        Corrupt checkpoints are renamed to ``step_N.damaged-<id>`` and reported. One that a rank cannot read stays as it
        is: its host may be at fault.

        Args:
            progress: called when the verification progresses.

        Raises:
            UserError: the run has checkpoints, and all of them are corrupt.
            OSError: a rank cannot read a checkpoint; raised on all ranks.
        """
        problems = []
        for path in self._of_first(lambda: step_directories(self.root)):
            try:
                problem = self._find_corruption(path, progress)
            except OSError as error:
                cure = "restart where it can be read, or rename this checkpoint to resume from an earlier one"
                raise OSError(f"checkpoint {path}: {error}; {cure}") from None
            if problem is None:
                return Checkpoint(path, step_of(path))
            problems.append(f"{path.name}: {problem}")
            self._of_first(lambda: str(quarantine(path)))  # noqa: B023  called at once
            if self._is_first:
                print(f"checkpoint {path}: {problem}; quarantined, trying the previous one", flush=True)
        if problems or self._of_first(lambda: bool(damaged(self.root))):
            why = "; ".join(problems) or "all were quarantined before"
            raise UserError(f"{self.root}: no valid checkpoint ({why}); restore one, or use another run.name")
        return None

    def _of_first(self, look: Callable[[], Any]) -> Any:
        """The result of ``look`` on rank 0; other ranks may see an outdated directory.

        Raises:
            OSError: rank 0 met one; raised on all ranks.
        """
        seen: list[Any] = [None, None]
        if self._is_first:
            try:
                seen[0] = look()
            except OSError as error:
                seen[1] = str(error)
        dist.broadcast_object_list(seen, src=0)
        result, failure = seen
        if failure is not None:
            raise OSError(failure)
        return result

    def _find_corruption(self, path: Path, progress: Callable[[str], None]) -> str | None:
        """Describes the corruption of a checkpoint directory, the same on every rank; None if it is valid."""
        manifest = self._of_first(lambda: read_manifest(path))
        if manifest is None:
            return WITHOUT_MANIFEST
        rank = dist.get_rank()
        own = share(pieces_of(path, manifest["files"]), range(dist.get_world_size()), rank)
        for folder in {piece.path.parent for piece in own}:
            with contextlib.suppress(OSError):
                os.listdir(folder)  # network file systems cache that a file is missing
        return check_together(Checking(own), gather_ranks, rank, progress, f"checkpoint {path.name}")


def _no_job() -> None:
    """The job of ranks that have nothing to do."""


def _try_to_remove(path: Path, how: Callable[[Path], None]) -> None:
    """Removes an old directory; if that fails, training goes on, and a later start tries again.

    On a network file system, a file that another process reads cannot be removed.
    """
    try:
        how(path)
    except OSError as error:
        print(f"checkpoint {path} could not be removed ({error}); the next start tries again", flush=True)
