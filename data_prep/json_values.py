"""Reads JSON that is not in lines one value at a time: an array, or concatenated values, indented or not."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from data_prep.packing import DamagedError

_BLOCK = 1 << 20
_LARGEST_VALUE = 1 << 28  # characters: an unfinished longer value counts as damage, before it fills the memory
_LONGEST_WORD = 16  # an error this close to the end may be a truncated word, such as -Infinity or \ud83d\ude00
# Byte-order marks occur before the first value, and between values of concatenated files.
_skip_space = re.compile("[ \t\r\n\ufeff]*").match
# Parsed as float, because Python's int rejects numbers of many thousand digits, and the text next to one is usable.
_decode = json.JSONDecoder(parse_int=float).raw_decode


class NotJsonError(DamagedError):
    """The text is not JSON. ``cut``: apparently because it is truncated."""

    def __init__(self, problem: str, cut: bool) -> None:
        super().__init__(problem)
        self.cut = cut


def json_values(stream: BinaryIO) -> Iterator[Any]:
    """Yields the elements of all arrays and all other values in order, holding one at a time in memory.

    Bytes that are not UTF-8 become lone surrogates (PEP 383), so that they only invalidate their own value.

    Raises:
        NotJsonError: says what was expected and where.
    """
    text = _Text(stream)
    while text.next_character():
        if not text.take("["):
            yield text.value()
        elif not text.take("]"):
            yield text.value()
            while text.take(","):
                yield text.value()
            if not text.take("]"):
                raise text.error("Expecting ',' or ']'")


class _Text:
    """A text that is read in blocks, from the current position on."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._buffer = ""
        self._position = 0
        self._consumed = 0

    def next_character(self) -> str:
        """Returns the next character that is not a space; empty at the end."""
        while True:
            found = _skip_space(self._buffer, self._position)
            assert found is not None
            self._position = found.end()
            if self._position < len(self._buffer):
                return self._buffer[self._position]
            if not self._grow():
                return ""

    def take(self, character: str) -> bool:
        """Consumes a character if it is the next one; returns whether it was."""
        is_next = self.next_character() == character
        self._position += is_next
        return is_next

    def value(self) -> Any:
        self.next_character()
        while True:
            try:
                value, end = _decode(self._buffer, self._position)
            except json.JSONDecodeError as problem:
                cut = problem.msg.startswith("Unterminated") or problem.pos > len(self._buffer) - _LONGEST_WORD
                if not cut or not self._grow():
                    raise self.error(problem.msg, problem.pos - self._position, cut) from None
            except RecursionError:
                raise self.error("nested too deeply", 0) from None
            else:
                length = end - self._position
                if end + 2 < len(self._buffer) or not self._grow():  # a number may continue in the next block
                    self._position += length
                    return value

    def error(self, problem: str, ahead: int = 0, cut: bool | None = None) -> NotJsonError:
        cut = not self.next_character() if cut is None else cut
        return NotJsonError(f"{problem} at character {self._consumed + self._position + ahead}", cut)

    def _grow(self) -> bool:
        """Reads at least as much as is buffered, so that a long value is retried only a few times; False at the end."""
        left = len(self._buffer) - self._position
        if left > _LARGEST_VALUE:
            raise self.error(f"no end of a value in {left} characters", cut=False)
        block = self._stream.read(max(_BLOCK, left))
        self._buffer = self._buffer[self._position :] + self._decoder.decode(block, final=not block)
        self._consumed += self._position
        self._position = 0
        return bool(block)
