"""A watchdog that kills a rank without progress, after reporting its stack and the collective it waits in."""

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

# Time to wait for the reports of other ranks, which notice the same hang slightly later.
_TIME_TO_REPORT_S = 5.0
_REMEMBERED_COLLECTIVES = "1000"
_STATUS = 1


class Watchdog:
    """Watches its own rank on a thread; use it as a context manager.

    Only time in which the process can run is counted, not time in which it is stopped or its host is suspended. An
    observer process watches this thread (see :mod:`dynmoe.train.pulse`).

    Create it before the process groups, which read on creation whether to record their collectives.

    Args:
        directory: directory for the reports of all ranks; created when needed.
        timeout_s: seconds without progress after which the rank exits; 0: never.
    """

    def __init__(self, directory: Path, timeout_s: float) -> None:
        self._directory = directory
        self._timeout_s = timeout_s
        self._rank = int(os.environ.get("RANK", "0"))
        self._ranks = int(os.environ.get("WORLD_SIZE", "1"))
        self._doing = "the start"
        self._silent_s = 0.0
        self._over = threading.Event()
        self._report = directory / f"rank_{self._rank}.json"
        self._main = threading.get_ident()
        if timeout_s > 0:
            os.environ.setdefault("TORCH_FR_BUFFER_SIZE", _REMEMBERED_COLLECTIVES)
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                self._report.unlink()  # report of an earlier attempt
            self._pulse = Pulse(timeout_s + 2 * _TIME_TO_REPORT_S)
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()

    def progress(self, doing: str) -> None:
        """Resets the timeout; ``doing`` describes what the rank does next."""
        self._doing = doing
        self._silent_s = 0.0

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
                    self._write_report()
                except Exception:  # such as a full disk; the rank must exit nevertheless
                    traceback.print_exc()
                finally:
                    os._exit(_STATUS)

    def _write_report(self) -> None:
        """Writes the stacks and pending collective of this rank; the first reporting rank prints a summary."""
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
        """One line per rank, after all ranks have reported or time has run out."""
        deadline = time.monotonic() + _TIME_TO_REPORT_S
        everyone = set(range(self._ranks))  # an earlier start with more ranks may have left more reports
        while not everyone <= (reports := read_reports(self._directory)).keys() and time.monotonic() < deadline:
            time.sleep(0.1)
        lines = [f"no progress for {self._timeout_s:g} s (guard.hang_timeout_s), in {self._doing}:"]
        for rank in range(self._ranks):
            report = reports.get(rank)
            if report is None:
                lines.append(f"  rank {rank} has not reported: it is stopped, has exited, or has no watchdog")
            elif report["waits_in"]:
                lines.append(f"  rank {rank} on {report['host']} waits in {report['waits_in']}")
            else:
                where = report["stack"][-1] if report["stack"] else "nowhere"
                lines.append(f"  rank {rank} on {report['host']} waits in no collective: it is at {where}")
        return "\n".join([*lines, f"stacks and flight recorders of all ranks: {self._directory}"])


def read_reports(directory: Path) -> dict[int, dict[str, Any]]:
    """Reports of hanging ranks, by rank, without those that are being written."""
    reports = {}
    for path in directory.glob("rank_*.json"):
        with contextlib.suppress(OSError, ValueError):
            report = json.loads(path.read_text())
            reports[report["rank"]] = report
    return reports


def pending_collective() -> str | None:
    """The oldest unfinished collective of this process in PyTorch's flight recorder, if any."""
    recorder = getattr(torch._C._distributed_c10d, "_dump_fr_trace_json", None)
    if recorder is None:
        return None
    trace = json.loads(recorder())
    for entry in trace.get("entries", []):
        if not entry["retired"]:
            group = entry["process_group"][1] or entry["process_group"][0]
            number = f"number {entry['collective_seq_id']} of group {group}"
            return f"{entry['profiling_name']} ({number}, input {entry['input_sizes']})"
    return None


def _dump_flight_recorder(path: Path) -> None:
    """Writes the flight recorder in the format of PyTorch's analyzer."""
    recorder = getattr(torch._C._distributed_c10d, "_dump_fr_trace", None)
    if recorder is not None:
        path.write_bytes(recorder())


def _stack(frame: FrameType | None) -> list[str]:
    """The call stack of a thread, outermost call first."""
    return [f"{entry.filename}:{entry.lineno} ({entry.name})" for entry in traceback.extract_stack(frame)]
