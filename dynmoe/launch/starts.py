"""Starts of a run: checks before each, and the decision whether another one should follow.

All launchers (torchrun, DeepSpeed, Slurm) use these two functions, so they stop and restart alike.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import time
from dataclasses import dataclass
from typing import Any

from dynmoe.config import Config
from dynmoe.data.corpus import open_corpora
from dynmoe.errors import UserError
from dynmoe.launch.elastic import fit_start, read_saved
from dynmoe.launched import read_failures
from dynmoe.train.checkpoint import latest_complete
from dynmoe.train.run_directory import PATIENCE_S, RunDirectory

# Exit statuses of ``after`` for shell scripts; torchrun and other launchers hide those of the ranks.
FINISHED = 0
FAILED_BY_USER = 2
NO_PROGRESS = 3
STOP_REQUESTED = 75
FAILED = 76


@dataclass(frozen=True)
class Verdict:
    """What a launcher should do after a start: an exit status, and a reason to print."""

    status: int
    reason: str


@dataclass(frozen=True)
class Start:
    """The directory of a start, the number of ranks that it uses, and a line if the number or the batch changed."""

    directory: RunDirectory
    ranks: int
    change: str


def begin(config: Config, ranks: int, node: int, patience_s: float = PATIENCE_S) -> Start:
    """Checks everything that needs no rank, and opens the run directory for a start.

    Each node records the start; the first one also deletes the outcome of the previous start.

    Args:
        ranks: number of available ranks on all nodes.
        node: index of this node.
        patience_s: how long to wait for another job in the directory to end.

    Raises:
        UserError: parallel sizes or batches do not fit the ranks, a corpus is missing or damaged, or the directory is
            not writable or in use by another job.
    """
    directory = RunDirectory(config.run.path)
    if node == 0:
        directory.claim(patience_s)
        shutil.rmtree(directory.failures, ignore_errors=True)
        directory.outcome.unlink(missing_ok=True)
    directory.logs.mkdir(parents=True, exist_ok=True)
    try:
        fit = fit_start(config, ranks)
        corpora = open_corpora(config.data.dirs, config.data.sequence_length)
        config.model.embedding_rows(corpora[0].tokenizer.vocab_size)
        _note(directory, fit.ranks, node)
    finally:
        directory.release()  # the ranks lock it next
    saved = None
    with contextlib.suppress(OSError):  # only described here: ranks that cannot read it either will say so
        saved = read_saved(directory)
    changes = fit.misfit or (saved is not None and saved.ranks != fit.ranks)
    return Start(directory, fit.ranks, fit.describe(saved) if changes else "")


def check_port(port: int, patience_s: float = PATIENCE_S) -> None:
    """Checks that a port of this host is free, waiting up to ``patience_s`` for a launch that is ending.

    Raises:
        UserError: the port is in use.
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
            raise UserError(f"MASTER_PORT={port}: {problem} on this host; use another port, the same on every node")
        time.sleep(0.2)


def _note(directory: RunDirectory, ranks: int, node: int) -> None:
    start = {"time": time.time(), "host": socket.gethostname(), "ranks": ranks, "step": _newest_step(directory)}
    with directory.starts(node).open("a") as stream:
        stream.write(json.dumps(start) + "\n")


def after(directory: RunDirectory, max_without_progress: int, node: int = 0) -> Verdict:
    """Decides what should follow a start that ended.

    Args:
        max_without_progress: maximum number of consecutive starts that end without a newer checkpoint.
        node: index of the calling node. Each node counts its own starts: another may have begun the next one already.
    """
    failures = read_failures(directory.failures)
    if any(failure["by_user"] for failure in failures):
        return Verdict(FAILED_BY_USER, "failed in a way that a restart would repeat; not restarting")
    outcome = _read_outcome(directory)
    if outcome.get("status") == "finished":
        return Verdict(FINISHED, f"finished at step {outcome['step']}")
    step = _newest_step(directory)
    if outcome.get("status") == "preempted":
        return Verdict(STOP_REQUESTED, f"stopped on request; rerun the same command to resume from step {step}")
    stalled = _starts_without_progress(directory, step, node)
    if stalled >= max_without_progress:
        return Verdict(NO_PROGRESS, f"{stalled} consecutive start(s) made no progress past step {step}; not restarting")
    counted = f"{stalled} of {max_without_progress} starts without progress"
    return Verdict(FAILED, f"failed; can resume from step {step} ({counted})")


def describe_failures(directory: RunDirectory) -> str:
    """Returns the first failing rank's traceback and the ranks without one; '' if no rank left a record."""
    failures = read_failures(directory.failures)
    if not failures:
        return ""
    first = failures[0]
    silent = sorted(set(range(first["ranks"])) - {failure["rank"] for failure in failures})
    lines = []
    if silent and not first["by_user"]:
        shown = ", ".join(str(rank) for rank in silent[:8]) + (", ..." if len(silent) > 8 else "")
        lines.append(f"rank(s) {shown} left no traceback: killed by a signal, or lost with their host")
    lines.append(f"first failure: rank {first['rank']} on {first['host']}; output of all ranks: {directory.logs}")
    lines.append(("error: " if first["by_user"] else "") + first["text"])
    return "\n".join(lines)


def _newest_step(directory: RunDirectory) -> int:
    checkpoint = latest_complete(directory.checkpoints)
    return 0 if checkpoint is None else checkpoint.step


def _read_outcome(directory: RunDirectory) -> dict[str, Any]:
    try:
        outcome = json.loads(directory.outcome.read_text())
    except (FileNotFoundError, ValueError):  # a damaged file is ignored: the other files decide
        return {}
    return outcome if isinstance(outcome, dict) else {}


def _starts_without_progress(directory: RunDirectory, step: int, node: int) -> int:
    """Counts the latest consecutive starts that began from ``step``, the newest checkpoint."""
    starts = directory.starts(node)
    lines = starts.read_text().splitlines() if starts.exists() else []
    count = 0
    for line in reversed(lines):
        try:
            began_from = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):  # truncated line of a host that died
            continue
        if began_from != step:
            break
        count += 1
    return count
