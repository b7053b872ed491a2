"""Ends a rank that makes no progress, after it has written where it is and which collective it waits in."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
import traceback
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from dynmoe.launched import record_failure
from dynmoe.train.pulse import Pulse

# What is waited for: other ranks notice the same hang a little later.
_TIME_TO_REPORT_S = 5.0
_REMEMBERED_COLLECTIVES = "1000"
_STATUS = 1


class Watchdog:
    """Watches over one rank, on a thread; every rank has its own, as who hangs cannot report for others.

    Only time in which this process could run counts: one that was stopped, or whose host slept, goes on. Another
    process watches over this thread (see :mod:`dynmoe.train.pulse`).

    Make it before process groups: they decide then whether they remember their collectives. It ends with its ``with``.

    Args:
        directory: for reports, of all ranks; made when there is one.
        timeout_s: without progress after which the rank ends; 0: never.
    """

    def __init__(self, directory: Path, timeout_s: float) -> None:
        self._directory, self._timeout_s = directory, timeout_s
        self._rank, self._ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self._doing, self._silent_s, self._over = "the start", 0.0, threading.Event()
        self._report, self._main = directory / f"rank_{self._rank}.json", threading.get_ident()
        if timeout_s > 0:
            os.environ.setdefault("TORCH_FR_BUFFER_SIZE", _REMEMBERED_COLLECTIVES)
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                self._report.unlink()  # of an earlier attempt
            self._pulse = Pulse(timeout_s + 2 * _TIME_TO_REPORT_S)
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()

    def progress(self, doing: str) -> None:
        """Says that the rank got on, and to what."""
        self._doing, self._silent_s = doing, 0.0

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(self, *error: object) -> None:
        """Stops watching."""
        if self._timeout_s > 0:
            self._over.set()
            self._thread.join()
            self._pulse.close()

    def _watch(self) -> None:
        tick = min(1.0, self._timeout_s / 10)
        while not self._over.wait(tick):
            self._pulse.beat()
            self._silent_s += tick
            if self._silent_s > self._timeout_s:
                try:
                    self._tell()
                except Exception:  # such as a full disk, which must not keep the rank
                    traceback.print_exc()
                finally:
                    os._exit(_STATUS)

    def _tell(self) -> None:
        """Writes where this rank is; the first that does says it for all."""
        self._directory.mkdir(parents=True, exist_ok=True)
        with (self._directory / f"rank_{self._rank}.txt").open("w") as stacks:
            faulthandler.dump_traceback(stacks, all_threads=True)
        report = {
            "rank": self._rank, "host": socket.gethostname(), "doing": self._doing, "waits_in": pending_collective(),
            "stack": _stack(sys._current_frames().get(self._main)),
        }  # fmt: skip
        self._report.write_text(json.dumps(report, indent=1))
        _dump_flight_recorder(self._directory / f"flight_recorder_rank_{self._rank}")
        text = self._summary()
        record_failure(text, by_user=False)
        if self._rank == min(read_reports(self._directory), default=self._rank):
            print(text, file=sys.stderr, flush=True)

    def _summary(self) -> str:
        """What the ranks have reported, each in a line, when all have or none comes any more."""
        deadline = time.monotonic() + _TIME_TO_REPORT_S
        while len(reports := read_reports(self._directory)) < self._ranks and time.monotonic() < deadline:
            time.sleep(0.1)
        lines = [f"no progress for {self._timeout_s:g} s (guard.hang_timeout_s), in {self._doing}:"]
        for rank in range(self._ranks):
            report = reports.get(rank)
            if report is None:
                lines.append(f"  rank {rank} reports nothing: it is stopped, gone, or not watched")
            elif report["waits_in"]:
                lines.append(f"  rank {rank} on {report['host']} waits in {report['waits_in']}")
            else:
                where = report["stack"][-1] if report["stack"] else "nowhere"
                lines.append(f"  rank {rank} on {report['host']} waits for no other: it is at {where}")
        return "\n".join([*lines, f"stacks and flight recorders of all ranks: {self._directory}"])


def read_reports(directory: Path) -> dict[int, dict[str, Any]]:
    """Reports of ranks that hung, by rank; one that is being written is left out."""
    reports = {}
    for path in directory.glob("rank_*.json"):
        with contextlib.suppress(OSError, ValueError):
            report = json.loads(path.read_text())
            reports[report["rank"]] = report
    return reports


def pending_collective() -> str | None:
    """The oldest collective of this process that has not ended, by PyTorch's flight recorder; None where all have."""
    recorder = getattr(torch._C._distributed_c10d, "_dump_fr_trace_json", None)
    if recorder is None:
        return None
    trace = json.loads(recorder())
    for entry in trace.get("entries", []):
        if not entry["retired"]:
            group = entry["process_group"][1] or entry["process_group"][0]
            name, count, sizes = entry["profiling_name"], entry["collective_seq_id"], entry["input_sizes"]
            return f"{name} (number {count} of group {group}, input {sizes})"
    return None


def _dump_flight_recorder(path: Path) -> None:
    """In the form that PyTorch's own analyzer reads."""
    recorder = getattr(torch._C._distributed_c10d, "_dump_fr_trace", None)
    if recorder is not None:
        path.write_bytes(recorder())


def _stack(frame: FrameType | None) -> list[str]:
    """Where a thread is, from the outermost call to the innermost."""
    return [f"{entry.filename}:{entry.lineno} ({entry.name})" for entry in traceback.extract_stack(frame)]
