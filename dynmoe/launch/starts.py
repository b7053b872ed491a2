"""Starts of a run: what must hold before one, and whether another should follow.

Every launcher asks the same two questions here, so that torchrun, DeepSpeed and Slurm stop and go on alike.
"""

from __future__ import annotations

import json
import shutil
import socket
import time
from dataclasses import dataclass
from typing import Any

from dynmoe.config import Config
from dynmoe.data.corpus import open_corpora
from dynmoe.errors import UserError
from dynmoe.launched import read_failures
from dynmoe.train.checkpoint import newest_complete
from dynmoe.train.run_directory import PATIENCE_S, RunDirectory

# Exit statuses of ``after``, for shell scripts; torchrun and others hide those of the ranks.
FINISHED, FAILED_BY_USER, NO_PROGRESS, TOLD_TO_END, FAILED = 0, 2, 3, 75, 76


@dataclass(frozen=True)
class Verdict:
    """What a launcher should do after a start: an exit status, and the reason in words."""

    status: int
    reason: str


def begin(config: Config, ranks: int, node: int, patience_s: float = PATIENCE_S) -> RunDirectory:
    """Checks what can be checked without a rank, and opens the run directory for a start.

    Each node takes note of the start; the first one forgets how the last one ended.

    Args:
        config: of the run.
        ranks: of all nodes.
        node: number of this node.
        patience_s: how long another job in the directory is waited for.

    Raises:
        UserError: parallel sizes or batches that do not fit the ranks, a missing or damaged corpus, a directory that
            cannot be written to or in which another job trains.
    """
    directory = RunDirectory(config.run.path)
    if node == 0:
        directory.claim(patience_s)
        shutil.rmtree(directory.failures, ignore_errors=True)
        directory.outcome.unlink(missing_ok=True)
    directory.logs.mkdir(parents=True, exist_ok=True)
    try:
        config.check_world(ranks)
        open_corpora(config.data.dirs, config.data.sequence_length)
        _note(directory, ranks, node)
    finally:
        directory.release()  # to the ranks
    return directory


def check_port(port: int, patience_s: float = PATIENCE_S) -> None:
    """Refuses a port of this host on which somebody listens after ``patience_s``: a launch that ends may let it go.

    Raises:
        UserError: naming it.
    """
    deadline = time.monotonic() + patience_s
    while True:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
                return
            except OSError as error:
                problem = error.strerror
        if time.monotonic() > deadline:
            raise UserError(f"MASTER_PORT={port}: {problem} on this host; give another one, the same on every node")
        time.sleep(0.2)


def _note(directory: RunDirectory, ranks: int, node: int) -> None:
    start = {"time": time.time(), "host": socket.gethostname(), "ranks": ranks, "step": _newest_step(directory)}
    with directory.starts(node).open("a") as stream:
        stream.write(json.dumps(start) + "\n")


def after(directory: RunDirectory, most_without_progress: int, node: int = 0) -> Verdict:
    """What should follow a start that ended.

    Args:
        directory: of the run.
        most_without_progress: starts in a row that may end without a checkpoint newer than the one they began from.
        node: number of the one that asks, which goes by its own starts: another may have begun the next one already.
    """
    failures = read_failures(directory.failures)
    if any(failure["by_user"] for failure in failures):
        return Verdict(FAILED_BY_USER, "failed in a way that another start would repeat; not started again")
    outcome = _read_outcome(directory)
    if outcome.get("status") == "finished":
        return Verdict(FINISHED, f"finished at step {outcome['step']}")
    step = _newest_step(directory)
    if outcome.get("status") == "preempted":
        return Verdict(TOLD_TO_END, f"told to end; the same command goes on from step {step}")
    vain = _starts_in_vain(directory, step, node)
    if vain >= most_without_progress:
        problem = f"{vain} start(s) in a row got no further than step {step}"
        return Verdict(NO_PROGRESS, f"{problem}; not started again")
    return Verdict(FAILED, f"failed; can go on from step {step} ({vain} of {most_without_progress} starts in vain)")


def describe_failures(directory: RunDirectory) -> str:
    """The first failing rank's traceback, and which ranks left none; '' where no rank left anything."""
    failures = read_failures(directory.failures)
    if not failures:
        return ""
    first = failures[0]
    silent = sorted(set(range(first["ranks"])) - {failure["rank"] for failure in failures})
    lines = []
    if silent and not first["by_user"]:
        shown = ", ".join(str(rank) for rank in silent[:8]) + (", ..." if len(silent) > 8 else "")
        lines.append(f"rank(s) {shown} left no traceback: ended by a signal, or with their host")
    lines.append(f"first failure: rank {first['rank']} on {first['host']}; output of all ranks: {directory.logs}")
    lines.append(("error: " if first["by_user"] else "") + first["text"])
    return "\n".join(lines)


def _newest_step(directory: RunDirectory) -> int:
    checkpoint = newest_complete(directory.checkpoints)
    return 0 if checkpoint is None else checkpoint.step


def _read_outcome(directory: RunDirectory) -> dict[str, Any]:
    try:
        outcome = json.loads(directory.outcome.read_text())
    except (FileNotFoundError, ValueError):  # damaged: then the other files decide
        return {}
    return outcome if isinstance(outcome, dict) else {}


def _starts_in_vain(directory: RunDirectory, step: int, node: int) -> int:
    """Starts at the end of the list that began from ``step``, the newest checkpoint there is."""
    starts = directory.starts(node)
    lines = starts.read_text().splitlines() if starts.exists() else []
    count = 0
    for line in reversed(lines):
        try:
            began_from = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):  # half a line, of a host that died
            continue
        if began_from != step:
            break
        count += 1
    return count
