"""A lock on a directory that one process holds as long as it lives, on file systems with ``flock`` and without.

Some mounts of Lustre, NFS and FUSE know no locks: ``flock`` fails with ENOSYS, EOPNOTSUPP or ENOLCK. There a file names
the process that holds the directory. Whether that process lives is looked up on the same host. From another host it is
seen by its pulse: it writes the file anew every few seconds, and one that is silent for a minute has lost the lock.
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
_LOOKED_EVERY_S = 0.1
_PULSE_S = 5.0
_SILENCE_S = 60.0
# Two that take over at the same moment both see who came last.
_SETTLED_S = 0.5


class Lock:
    """Held from when it is made until it is released or the process ends, however that happens.

    Args:
        path: of the file that stands for what is locked; its directory exists.
        patience_s: how long another holder is waited for.

    Raises:
        BlockingIOError: another process holds it.
        OSError: the file cannot be written.
    """

    def __init__(self, path: Path, patience_s: float) -> None:
        self._stream = path.open("w")
        self._named: _NamedHolder | None = None
        deadline = time.monotonic() + patience_s
        try:
            while not _flock(self._stream.fileno()):
                if time.monotonic() > deadline:
                    raise BlockingIOError(errno.EAGAIN, "another process holds it", str(path))
                time.sleep(_LOOKED_EVERY_S)
        except OSError as error:
            self._stream.close()
            if error.errno not in _WITHOUT_LOCKS:
                raise
            self._named = _NamedHolder(path.with_name(f"{path.name}.holder"), patience_s)

    def release(self) -> None:
        """Lets another process have it."""
        self._stream.close()
        if self._named is not None:
            self._named.release()


def _flock(descriptor: int) -> bool:
    """Whether the lock was free."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class _NamedHolder:
    """The lock where there is no ``flock``: a file with the name of its holder, and its pulse."""

    def __init__(self, path: Path, patience_s: float) -> None:
        self._path, self._id, self._pulse = path, secrets.token_hex(8), 0
        self._released = threading.Event()
        self._descriptor = self._take(patience_s)
        self._thread = threading.Thread(target=self._live, name="lock", daemon=True)
        self._thread.start()
        atexit.register(self.release)

    def _content(self) -> bytes:
        """Always of the same length: it is written over itself."""
        return f"{json.dumps({'id': self._id, **_this_process()})}\n{self._pulse:012d}\n".encode()

    def _take(self, patience_s: float) -> int:
        """Waits until the file is this process's own; returns its descriptor.

        Raises:
            BlockingIOError: another holds it, and lives.
        """
        began = changed = time.monotonic()
        first = latest = _read(self._path)
        while True:
            now, content = time.monotonic(), _read(self._path)
            if content != latest:
                latest, changed = content, now
            if content is None:
                if (descriptor := self._create(self._path)) is not None:
                    return descriptor
            elif _has_ended(content) or now - changed > _SILENCE_S:
                if (descriptor := self._take_over()) is not None:
                    return descriptor
            elif now - began > patience_s and (_is_here(content) or content != first):
                raise BlockingIOError(errno.EAGAIN, "another process holds it", str(self._path))
            time.sleep(_LOOKED_EVERY_S)

    def _create(self, path: Path) -> int | None:
        """A new file of this process; None where there is one already."""
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644)
        except FileExistsError:
            return None
        self._write(descriptor)
        return descriptor

    def _take_over(self) -> int | None:
        """Puts a file of this process in the place of one whose holder is gone; None where another was faster."""
        own = self._path.with_name(f"{self._path.name}.{self._id}")
        descriptor = self._create(own)
        assert descriptor is not None
        own.rename(self._path)
        time.sleep(_SETTLED_S)
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
        """Shows that this process lives; ends it if another one has taken it for dead meanwhile."""
        while not self._released.wait(_PULSE_S):
            self._pulse += 1
            with contextlib.suppress(OSError):  # the next pulse may reach the file again
                if (found := _read(self._path)) is not None and _facts(found).get("id", self._id) != self._id:
                    other = _facts(found)
                    print(
                        f"error: {self._path}: this process was silent for more than {_SILENCE_S:g} s, and process "
                        f"{other.get('pid')} on {other.get('host')} has taken its place; it ends",
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
    """What is in the file; None where there is none. Opening it anew shows what other hosts have written."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _facts(content: bytes) -> dict[str, Any]:
    """What a file says of its holder; nothing where it is just being written."""
    try:
        facts = json.loads(content.split(b"\n")[0])
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) else {}


def _this_process() -> dict[str, Any]:
    return {"host": socket.gethostname(), "place": _place(), "pid": os.getpid(), "started": _started(os.getpid())}


def _place() -> str | None:
    """Where a process id means the same process: this boot of this host, and container. None where that is unknown."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _started(pid: int) -> str | None:
    """When a process began, by the kernel's clock: ids come again. None where it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]


def _is_here(content: bytes) -> bool:
    """Whether the holder can be looked up by this process."""
    return _place() is not None and _facts(content).get("place") == _place()


def _has_ended(content: bytes) -> bool:
    """Whether the holder is known to have ended."""
    facts = _facts(content)
    return _is_here(content) and _started(facts["pid"]) != facts["started"]
