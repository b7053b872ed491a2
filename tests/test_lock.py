"""A lock has one live holder, on file systems with and without flock."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from data_prep.build import _claim
from dynmoe import lock
from dynmoe.errors import UserError
from dynmoe.lock import Lock
from dynmoe.train.checkpoint import write_atomically
from dynmoe.train.run_directory import RunDirectory

ROOT = Path(__file__).parents[1]
WITHOUT_LOCKS = [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK]
HOLD = """
import errno, fcntl, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from dynmoe import lock
def flock(*arguments): raise OSError(errno.ENOSYS, "Function not implemented")
lock.fcntl.flock, lock._HEARTBEAT_S = flock, 0.05
held = lock.Lock(Path(sys.argv[2]), 0.0)
print("held", flush=True)
time.sleep(60)
"""


def without_locks(monkeypatch: pytest.MonkeyPatch, number: int = errno.ENOSYS) -> None:
    def flock(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)


@contextmanager
def holder(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock, where there is no flock."""
    command = [sys.executable, "-S", "-c", HOLD, str(ROOT), str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n", process.communicate()[1]
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(params=["flock", *WITHOUT_LOCKS], ids=lambda number: errno.errorcode.get(number, number))
def file_system(request, monkeypatch) -> None:
    if request.param != "flock":
        without_locks(monkeypatch, request.param)


def test_f09_one_job_holds_a_run_directory_on_every_file_system(file_system, tmp_path):
    first = RunDirectory(tmp_path / "run")
    second = RunDirectory(tmp_path / "run")
    for _ in range(2):
        first.claim()
        with pytest.raises(UserError, match=r"run\.name: another job trains in .*/run; wait for it"):
            second.claim(patience_s=0.2)
        first.release()
        second.claim(patience_s=0.2)
        second.release()


def test_one_build_holds_a_corpus_on_every_file_system(file_system, tmp_path):
    with _claim(tmp_path / "node_0.lock"), pytest.raises(UserError, match="another process is running this build"):
        _claim(tmp_path / "node_0.lock").__enter__()
    with _claim(tmp_path / "node_0.lock"):
        pass


def test_f09_other_errors_are_reported_unchanged(monkeypatch, tmp_path):
    without_locks(monkeypatch, errno.EIO)
    with pytest.raises(UserError, match=r"cannot be written \(Input/output error\)"):
        RunDirectory(tmp_path / "run").claim()


def test_a_killed_process_loses_the_lock(monkeypatch, tmp_path):
    without_locks(monkeypatch)
    with holder(tmp_path / "lock") as process:
        with pytest.raises(BlockingIOError):
            Lock(tmp_path / "lock", 0.2)
        process.send_signal(signal.SIGKILL)
        process.wait()
        Lock(tmp_path / "lock", 0.2).release()


def another_host(path: Path) -> dict[str, Any]:
    """Makes the file that names the holder one of another host."""
    facts = {"id": "another", "host": "node-b", "place": "another boot", "pid": os.getpid(), "started": "1"}
    path.write_text(json.dumps(facts) + "\n000000000000\n")
    return facts


def test_a_silent_host_loses_the_lock(monkeypatch, tmp_path):
    without_locks(monkeypatch)
    monkeypatch.setattr(lock, "_SILENCE_S", 0.5)
    another_host(tmp_path / "lock.holder")
    began = time.monotonic()
    held = Lock(tmp_path / "lock", 0.0)
    assert time.monotonic() - began > 0.5
    assert json.loads((tmp_path / "lock.holder").read_text().splitlines()[0])["pid"] == os.getpid()
    held.release()
    assert not (tmp_path / "lock.holder").exists()


def test_a_host_with_a_heartbeat_keeps_the_lock(monkeypatch, tmp_path):
    without_locks(monkeypatch)
    monkeypatch.setattr(lock, "_SILENCE_S", 0.5)
    path = tmp_path / "lock.holder"
    over = threading.Event()
    facts = another_host(path)

    def live() -> None:
        for beat in range(1000):
            with path.open("r+") as stream:  # over itself, as a holder does
                stream.write(json.dumps(facts) + f"\n{beat:012d}\n")
            if over.wait(0.05):
                return

    thread = threading.Thread(target=live)
    thread.start()
    try:
        with pytest.raises(BlockingIOError):
            Lock(tmp_path / "lock", 1.0)
    finally:
        over.set()
        thread.join()


def test_a_process_whose_lock_was_taken_ends(tmp_path):
    """It was silent for too long, and two processes must not write to one directory."""
    with holder(tmp_path / "lock") as process:
        other = tmp_path / "other"
        another_host(other)
        other.rename(tmp_path / "lock.holder")
        said = process.communicate(timeout=20)[1]
        assert process.returncode == 1
        assert f"process {os.getpid()} on node-b has taken over; exiting" in said


def test_two_that_take_over_at_once_leave_one_holder(monkeypatch, tmp_path):
    without_locks(monkeypatch)
    monkeypatch.setattr(lock, "_SILENCE_S", 0.3)
    another_host(tmp_path / "lock.holder")
    held: list[Lock] = []

    def take() -> None:
        try:
            held.append(Lock(tmp_path / "lock", 0.0))
        except BlockingIOError:
            return

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(held) == 1
    held[0].release()


def failing_fsync(number: int, directories: bool) -> Callable[[int], None]:
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}") == directories:
            raise OSError(number, os.strerror(number))
        real(descriptor)

    return fsync


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP])
def test_directories_that_cannot_be_synced_do_not_end_a_run(monkeypatch, tmp_path, number):
    monkeypatch.setattr(os, "fsync", failing_fsync(number, directories=True))
    write_atomically(tmp_path / "file", "content")
    assert (tmp_path / "file").read_text() == "content"
    monkeypatch.undo()
    monkeypatch.setattr(os, "fsync", failing_fsync(errno.EIO, directories=True))
    with pytest.raises(OSError, match="Input/output error"):
        write_atomically(tmp_path / "file", "content")
    monkeypatch.undo()
    monkeypatch.setattr(os, "fsync", failing_fsync(number, directories=False))
    with pytest.raises(OSError, match=os.strerror(number)):
        write_atomically(tmp_path / "file", "what may not be on the disk")
