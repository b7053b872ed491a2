"""JSON that is not in lines, a value at a time: an array, or values one after the other, indented or not."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from data_prep.packing import DamagedError

_BLOCK = 1 << 20
_LARGEST_VALUE = 1 << 28  # characters: what does not end before is taken for damage, before it fills the memory
_LONGEST_WORD = 16  # an error this near to the end may be a word that the end cuts: -Infinity, \ud83d\ude00
# A byte-order mark stands before the first value, and inside where files were joined.
_skip_space = re.compile("[ \t\r\n\ufeff]*").match
# A number of many thousand digits, which Python's int refuses, is no reason to refuse a text beside it.
_decode = json.JSONDecoder(parse_int=float).raw_decode


class NotJsonError(DamagedError):
    """What stands there is no JSON. ``cut``: because the end came too early, as far as can be told."""

    def __init__(self, problem: str, cut: bool) -> None:
        super().__init__(problem)
        self.cut = cut


def json_values(stream: BinaryIO) -> Iterator[Any]:
    """Elements of all arrays and all other values, in their order; no more than one of them is in memory.

    Bytes that are not UTF-8 become lone surrogates (PEP 383): they cost the value in which they are.

    Raises:
        NotJsonError: with what was expected, and where.
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
    """Text of which a part is there: from the place that was reached."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._there = ""
        self._place = 0
        self._passed = 0

    def next_character(self) -> str:
        """The next one that is no space; nothing at the end."""
        while True:
            found = _skip_space(self._there, self._place)
            assert found is not None
            self._place = found.end()
            if self._place < len(self._there):
                return self._there[self._place]
            if not self._grow():
                return ""

    def take(self, character: str) -> bool:
        """Goes past a character, if it is the next one."""
        is_next = self.next_character() == character
        self._place += is_next
        return is_next

    def value(self) -> Any:
        self.next_character()
        while True:
            try:
                value, end = _decode(self._there, self._place)
            except json.JSONDecodeError as problem:
                cut = problem.msg.startswith("Unterminated") or problem.pos > len(self._there) - _LONGEST_WORD
                if not cut or not self._grow():
                    raise self.error(problem.msg, problem.pos - self._place, cut) from None
            except RecursionError:
                raise self.error("nested too deeply", 0) from None
            else:
                length = end - self._place
                if end + 2 < len(self._there) or not self._grow():  # a number may go on in the next block: 1, 1. or 1e-
                    self._place += length
                    return value

    def error(self, problem: str, ahead: int = 0, cut: bool | None = None) -> NotJsonError:
        cut = not self.next_character() if cut is None else cut
        return NotJsonError(f"{problem} at character {self._passed + self._place + ahead}", cut)

    def _grow(self) -> bool:
        """Reads on; False at the end. At least as much as is there: a long value is tried a few times only."""
        left = len(self._there) - self._place
        if left > _LARGEST_VALUE:
            raise self.error(f"no end of a value in {left} characters", cut=False)
        block = self._stream.read(max(_BLOCK, left))
        self._there = self._there[self._place :] + self._decoder.decode(block, final=not block)
        self._passed += self._place
        self._place = 0
        return bool(block)
