"""A lock on a directory that one process holds while it lives, on file systems with and without ``flock``.

Some mounts of Lustre, NFS and FUSE do not support locks: ``flock`` fails with ENOSYS, EOPNOTSUPP or ENOLCK. There, a
file names the process that holds the directory. On the same host, others check whether that process lives. On other
hosts they watch its heartbeat: the holder rewrites the file every few seconds, and loses the lock after a minute of
silence.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import fcntl
import json
import os
import secrets
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

_WITHOUT_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
_POLL_INTERVAL_S = 0.1
_HEARTBEAT_S = 5.0
_SILENCE_S = 60.0
# After this time, processes that take over at the same moment all see which one was last.
_SETTLE_S = 0.5


class Lock:
    """A lock held from construction until it is released or the process ends for any reason.

    Args:
        path: lock file; its directory exists.
        patience_s: how long to wait for another holder.

    Raises:
        BlockingIOError: another process holds the lock.
        OSError: the file cannot be written.
    """

    def __init__(self, path: Path, patience_s: float) -> None:
        self._stream = path.open("w")
        self._named: _NamedHolder | None = None
        deadline = time.monotonic() + patience_s
        try:
            while not _flock(self._stream.fileno()):
                if time.monotonic() > deadline:
                    raise BlockingIOError(errno.EAGAIN, "another process holds the lock", str(path))
                time.sleep(_POLL_INTERVAL_S)
        except OSError as error:
            self._stream.close()
            if error.errno not in _WITHOUT_LOCKS:
                raise
            self._named = _NamedHolder(path.with_name(f"{path.name}.holder"), patience_s)

    def release(self) -> None:
        """Releases the lock."""
        self._stream.close()
        if self._named is not None:
            self._named.release()


def _flock(descriptor: int) -> bool:
    """Tries to lock; returns whether it succeeded."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class _NamedHolder:
    """The lock on file systems without ``flock``: a file with the name and the heartbeat of its holder."""

    def __init__(self, path: Path, patience_s: float) -> None:
        self._path = path
        self._id = secrets.token_hex(8)
        self._heartbeats = 0
        self._released = threading.Event()
        self._descriptor = self._take(patience_s)
        self._thread = threading.Thread(target=self._live, name="lock", daemon=True)
        self._thread.start()
        atexit.register(self.release)

    def _content(self) -> bytes:
        """Returns the file's content, always of the same length because it is overwritten in place."""
        return f"{json.dumps({'id': self._id, **_this_process()})}\n{self._heartbeats:012d}\n".encode()

    def _take(self, patience_s: float) -> int:
        """Waits until this process owns the file; returns its descriptor.

        Raises:
            BlockingIOError: another live process holds it.
        """
        began = changed = time.monotonic()
        first = latest = _read(self._path)
        while True:
            now = time.monotonic()
            content = _read(self._path)
            if content != latest:
                latest = content
                changed = now
            if content is None:
                if (descriptor := self._create(self._path)) is not None:
                    return descriptor
            elif _has_ended(content) or now - changed > _SILENCE_S:
                if (descriptor := self._take_over()) is not None:
                    return descriptor
            elif now - began > patience_s and (_is_here(content) or content != first):
                raise BlockingIOError(errno.EAGAIN, "another process holds the lock", str(self._path))
            time.sleep(_POLL_INTERVAL_S)

    def _create(self, path: Path) -> int | None:
        """Creates the file for this process; returns None if it exists."""
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644)
        except FileExistsError:
            return None
        self._write(descriptor)
        return descriptor

    def _take_over(self) -> int | None:
        """Replaces the file of a dead holder by one of this process; returns None if another process was faster."""
        own = self._path.with_name(f"{self._path.name}.{self._id}")
        descriptor = self._create(own)
        assert descriptor is not None
        own.rename(self._path)
        time.sleep(_SETTLE_S)
        if self._is_own():
            return descriptor
        os.close(descriptor)
        return None

    def _write(self, descriptor: int) -> None:
        os.pwrite(descriptor, self._content(), 0)
        os.fsync(descriptor)

    def _is_own(self) -> bool:
        return _facts(_read(self._path) or b"").get("id") == self._id

    def _live(self) -> None:
        """Sends heartbeats; ends this process if another one has taken over the lock."""
        while not self._released.wait(_HEARTBEAT_S):
            self._heartbeats += 1
            with contextlib.suppress(OSError):  # the next heartbeat may succeed
                if (found := _read(self._path)) is not None and _facts(found).get("id", self._id) != self._id:
                    other = _facts(found)
                    print(
                        f"error: {self._path}: no heartbeat of this process for {_SILENCE_S:g} s, so process "
                        f"{other.get('pid')} on {other.get('host')} has taken over; exiting",
                        file=sys.stderr, flush=True,
                    )  # fmt: skip
                    os._exit(1)
                self._write(self._descriptor)

    def release(self) -> None:
        if self._released.is_set():
            return
        self._released.set()
        self._thread.join()
        atexit.unregister(self.release)
        with contextlib.suppress(OSError):
            if self._is_own():
                self._path.unlink()
        os.close(self._descriptor)


def _read(path: Path) -> bytes | None:
    """Returns the file's content, None if it is missing. Reopening it shows what other hosts have written."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _facts(content: bytes) -> dict[str, Any]:
    """Parses the holder's facts; returns an empty dict while the file is being written."""
    try:
        facts = json.loads(content.split(b"\n")[0])
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) else {}


def _this_process() -> dict[str, Any]:
    return {"host": socket.gethostname(), "place": _place(), "pid": os.getpid(), "started": _started(os.getpid())}


def _place() -> str | None:
    """Identifies the scope of a process id: this boot of this host and its PID namespace. None if unknown."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _started(pid: int) -> str | None:
    """Start time of a process by the kernel's clock, because ids are reused. None if the process has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]


def _is_here(content: bytes) -> bool:
    """Whether this process can look up the holder's process id."""
    return _place() is not None and _facts(content).get("place") == _place()


def _has_ended(content: bytes) -> bool:
    """Whether the holder is known to have ended."""
    facts = _facts(content)
    return _is_here(content) and _started(facts["pid"]) != facts["started"]
