"""The checkpoints of a run in training: saved beside the steps that follow, committed by all ranks together.

A save is a chain of jobs. Each runs on a thread of every rank (writing and hashing need no process group), and the next
begins when it has ended everywhere, which ranks tell each other between two steps. So nothing is exchanged behind the
back of a step, and saving at once is the same chain, waited for.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dynmoe.data.pieces import Checking
from dynmoe.errors import UserError, first_line
from dynmoe.train.checkpoint import (
    TRAINER,
    UNFINISHED,
    WITHOUT_MANIFEST,
    Checkpoint,
    beyond,
    commit,
    damaged,
    hashes,
    leftovers,
    pieces_of,
    problem_of_files,
    put_aside,
    read_manifest,
    remove,
    step_directories,
    step_of,
)
from dynmoe.train.engine import Snapshot
from dynmoe.train.verification import check_together, over_ranks, share

# How long a network file system may take to show a file that another host has made.
_SIGHT_S = 5.0

Job = Callable[[], Any]
# What another start would meet again.
_LASTING = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}


class _Work:
    """A job on a thread that gives way to the step beside it."""

    def __init__(self, job: Job) -> None:
        self._job, self.result = job, None
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with contextlib.suppress(OSError, AttributeError):  # Linux: of this thread alone
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        try:
            self.result = self._job()
        except Exception as error:
            self.error = error

    @property
    def goes_on(self) -> bool:
        return self._thread.is_alive()

    def wait(self) -> None:
        self._thread.join()


class CheckpointStore:
    """The checkpoints of one run, in ``root``. Methods are collective unless they say otherwise.

    Args:
        root: directory, shared by all ranks.
        keep: newest checkpoints that stay.
        milestones: checkpoints of a step that is a multiple of it stay too; 0: none.
    """

    def __init__(self, root: Path, keep: int, milestones: int = 0) -> None:
        self.root, self.keep, self.milestones = root, keep, milestones
        self._is_first = dist.get_rank() == 0
        self._jobs: Generator[Job, Any, None] | None = None
        self._work: _Work | None = None
        self._building = root

    def begin(
        self, step: int, snapshot: Callable[[Path], Snapshot], trainer_state: dict[str, Any], facts: dict[str, Any]
    ) -> None:
        """Begins to save step ``step``, when an earlier save has ended; what it holds is taken now.

        Args:
            step: of the checkpoint.
            snapshot: of the engine, given the directory to write into.
            trainer_state: the rest of the run's state; the first rank's is written.
            facts: for whoever looks at the manifest: parallel sizes, hashes of configuration and data.

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
        self._work = _Work(next(self._jobs))

    def _save(self, final: Path, snapshot: Snapshot, trainer_state: str, manifest: dict[str, Any]) -> Generator[Job]:
        """The jobs of a save, one after the other; what stands between them is collective."""
        building, nothing = self._building, lambda: None

        def write() -> dict[str, dict[str, Any]]:
            files = snapshot.write()
            if self._is_first:
                (building / TRAINER).write_text(trainer_state)
                files = [*files, building / TRAINER]
            return hashes(files, building)

        own = yield write
        own |= self._together(lambda: hashes(snapshot.finish(), building))
        files = {name: facts for part in over_ranks(own) for name, facts in part.items()}
        yield (lambda: commit(building, final, {**manifest, "files": files})) if self._is_first else nothing

        def verify() -> None:
            if problem := problem_of_files(final, own):
                raise OSError(f"{final}: {problem} right after it was written; older checkpoints are kept")

        yield verify
        yield self._prune if self._is_first else nothing

    @property
    def saving(self) -> bool:
        """Whether a save has begun and not ended; the same on every rank, local."""
        return self._work is not None

    @property
    def busy(self) -> bool:
        """Whether this rank's present job goes on; local."""
        return self._work is not None and self._work.goes_on

    def advance(self) -> None:
        """Goes on to the next job of a save; for when no rank is busy.

        Raises:
            UserError: a rank could not write, for a reason that stays.
            OSError: a rank could not write.
        """
        assert self._work is not None
        assert self._jobs is not None
        self._work.wait()
        done, self._work = self._work, None
        self._agree(done.error)
        with contextlib.suppress(StopIteration):
            self._work = _Work(self._jobs.send(done.result))

    def wait(self) -> None:
        """Ends a save that was begun; raises what :meth:`advance` does."""
        while self.saving:
            self.advance()

    def _together(self, action: Callable[[], Any]) -> Any:
        """Does something on every rank, and fails on all of them where it fails on one."""
        result, failure = None, None
        try:
            result = action()
        except Exception as error:
            failure = error
        self._agree(failure)
        return result

    def _agree(self, failure: Exception | None) -> None:
        told = None if failure is None else (first_line(failure), _lasts(failure))
        failed = [(rank, *told) for rank, told in enumerate(over_ranks(told)) if told is not None]
        if not failed:
            return
        if self._is_first and self._building != self.root:
            shutil.rmtree(self._building, ignore_errors=True)  # a full disk gets its space back
        rank, text, lasting = failed[0]
        problem = f"checkpoint {self._building} could not be saved (rank {rank}: {text})"
        if lasting:
            raise UserError(f"{problem}; make room or mend the rights, and start again: the one before is intact")
        raise OSError(problem) from failure

    def _prune(self) -> None:
        for old in beyond(step_directories(self.root), self.keep, self.milestones):
            remove(old)

    def check_shared(self) -> None:
        """Refuses a directory that is not the same one for every rank: half a checkpoint would lie on each host.

        Raises:
            UserError: naming the ranks that look elsewhere.
        """
        mark = [f".shared-{secrets.token_hex(4)}"]
        dist.broadcast_object_list(mark, src=0)
        path = self.root / mark[0]

        def make() -> None:
            self.root.mkdir(parents=True, exist_ok=True)
            path.touch()

        self._together(make if self._is_first else lambda: None)
        deadline = time.monotonic() + _SIGHT_S
        while not (seen := path.exists()) and time.monotonic() < deadline:
            time.sleep(0.1)
            with contextlib.suppress(OSError):
                os.listdir(self.root)  # network file systems remember that a file was not there
        everywhere = over_ranks(None if seen else socket.gethostname())
        if self._is_first:
            path.unlink()
        blind = [f"{rank} (on {host})" for rank, host in enumerate(everywhere) if host is not None]
        if blind:
            problem = f"{self.root.resolve()} of rank 0 is not seen by rank {', '.join(blind)}"
            raise UserError(f"run.dir: {problem}; name a directory that all hosts share, by its whole path")

    def remove_leftovers(self) -> None:
        """Removes what interrupted saves and removals left behind."""
        if self._is_first:
            for leftover in leftovers(self.root):
                shutil.rmtree(leftover)
        dist.barrier()

    def newest(self, progress: Callable[[str], None] = lambda doing: None) -> Checkpoint | None:
        """The newest checkpoint whose every hash is right; None in a run that has none yet. Ranks share the files.

        Damaged ones are renamed to ``step_N.damaged-<id>`` and reported.

        Args:
            progress: is told when the ranks get on.

        Raises:
            UserError: there are checkpoints, and all of them are damaged.
        """
        problems = []
        for path in self._of_first(lambda: step_directories(self.root)):
            problem = self._problem_of(path, progress)
            if problem is None:
                return Checkpoint(path, step_of(path))
            problems.append(f"{path.name}: {problem}")
            self._of_first(lambda: str(put_aside(path)))  # noqa: B023  called at once
            if self._is_first:
                print(f"checkpoint {path}: {problem}; put aside, trying the one before", flush=True)
        if problems or self._of_first(lambda: bool(damaged(self.root))):
            why, cure = "; ".join(problems) or "all were found damaged before", "start anew with another run.name"
            raise UserError(f"{self.root}: no checkpoint is undamaged ({why}); restore one, or {cure}")
        return None

    def _of_first(self, look: Callable[[], Any]) -> Any:
        """What the first rank sees: others may see what was there a moment ago."""
        seen = [look() if self._is_first else None]
        dist.broadcast_object_list(seen, src=0)
        return seen[0]

    def _problem_of(self, path: Path, progress: Callable[[str], None]) -> str | None:
        """What is wrong with a checkpoint directory, the same on every rank; None where all of its files are sound."""
        manifest = self._of_first(lambda: read_manifest(path))
        if manifest is None:
            return WITHOUT_MANIFEST
        rank, ranks = dist.get_rank(), range(dist.get_world_size())
        own = share(pieces_of(path, manifest["files"]), ranks, rank)
        for folder in {piece.path.parent for piece in own}:
            with contextlib.suppress(OSError):
                os.listdir(folder)  # network file systems remember that a file was not there
        return check_together(Checking(own), over_ranks, rank, progress, f"checkpoint {path.name}")


def _lasts(failure: Exception) -> bool:
    """Whether another start would meet it again, by its number; safetensors has that in its text alone."""
    number = getattr(failure, "errno", None)
    if number is None and (said := re.search(r"os error (\d+)", str(failure))):
        number = int(said.group(1))
    return number in _LASTING
