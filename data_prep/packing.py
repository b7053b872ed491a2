"""Decompresses files, by gzip or Zstandard as their first bytes indicate."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import zstandard

from dynmoe.errors import UserError, first_line

ENDINGS = (".gz", ".zst", ".zstd")
_GZIP = b"\x1f\x8b\x08"
_ZSTD = b"\x28\xb5\x2f\xfd"
_SKIPPABLE = b"\x2a\x4d\x18"  # after a byte 0x50 to 0x5f; parallel compressors write such a frame first
_LARGEST_WINDOW = 1 << 31  # for zstd --long=31; the library's default limit is 128 MB
_BLOCK = 1 << 17


class DamagedError(Exception):
    """The content of a file does not match its format; the text says how and where."""


def unreadable(path: str | Path, error: BaseException) -> UserError:
    """Returns the error for a source file that cannot be read."""
    return UserError(f"source {path}: cannot be read ({first_line(error)}); fix or remove it")


@contextmanager
def named(path: str | Path) -> Iterator[None]:
    """Turns any read error into a UserError that names the file."""
    try:
        yield
    except (OSError, EOFError, zlib.error, zstandard.ZstdError, DamagedError) as error:
        raise unreadable(path, error) from None


def is_packed(start: bytes) -> bool:
    """Whether the first bytes of a file, at least four, indicate compression."""
    skippable = start[1:4] == _SKIPPABLE and 0x50 <= start[0] <= 0x5F
    return start.startswith((_GZIP, _ZSTD)) or skippable


@contextmanager
def unpacked(path: str | Path) -> Iterator[BinaryIO]:
    """Opens a file, decompressing all gzip members or Zstandard frames if it is compressed."""
    with open(path, "rb") as stored:
        yield unpack(stored)


def unpack(stored: BinaryIO) -> BinaryIO:
    """:func:`unpacked` for a file that is already open."""
    stored.seek(0)
    start = stored.read(4)
    stored.seek(0)
    if not is_packed(start):
        return stored
    if start.startswith(_GZIP):
        return io.BufferedReader(cast(io.RawIOBase, gzip.GzipFile(fileobj=stored)), _BLOCK)
    return io.BufferedReader(_Blocks(_frames(stored)), _BLOCK)


def _frames(stored: BinaryIO) -> Iterator[bytes]:
    """Yields the content of all Zstandard frames.

    Raises:
        EOFError: the last frame is truncated (the library's own readers stop there silently).
    """
    frame = None
    while block := stored.read(_BLOCK):
        while block:
            frame = frame or zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW).decompressobj()
            yield frame.decompress(block)
            block = frame.unused_data if frame.eof else b""
            if frame.eof:
                frame = None
    if frame is not None:
        raise EOFError("the compressed text is truncated")


class _Blocks(io.RawIOBase):
    """Presents blocks of bytes as a file."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks = blocks
        self._left = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        while not self._left:
            block = next(self._blocks, None)
            if block is None:
                return 0
            self._left = memoryview(block)
        place = memoryview(target)
        size = min(len(place), len(self._left))
        place[:size] = self._left[:size]
        self._left = self._left[size:]
        return size
