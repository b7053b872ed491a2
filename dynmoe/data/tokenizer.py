"""What the rest of the framework knows about a tokenizer, of whatever kind."""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from codecs import getincrementaldecoder
from collections.abc import Iterator, Sequence
from typing import ClassVar

_LONE_BYTE = re.compile("[\udc80-\udcff]")  # how Python decodes a byte that is no text (surrogateescape)


class Tokenizer(ABC):
    """Converts between text and token ids; :func:`dynmoe.data.tokenizer_files.open_tokenizer` opens one.

    Attributes:
        name: how its ids are named in messages, by the library that gives them.
        main_file: name of its file, without which there is no tokenizer.
        files: contents of all its files by name; a directory that has them has the tokenizer.
        sha256: identifies the tokenizer by its files; see also :meth:`encodes_like`.
        eod: id of the token that ends each document.
        vocab_size: the largest id plus 1.
        unknown: id of the token for what the vocabulary lacks; None if there is none.
        has_bytes: whether any character can be encoded as bytes; then the unknown token is never used.
        special_tokens: whether the name of a special token in a text becomes this token; else it stays text.
    """

    name: ClassVar[str]
    main_file: ClassVar[str]
    files: dict[str, bytes]
    eod: int
    vocab_size: int
    unknown: int | None
    has_bytes: bool
    special_tokens: bool = False

    @property
    def content(self) -> bytes:
        """Content of the main file."""
        return self.files[self.main_file]

    @property
    def sha256(self) -> str:
        return hashlib.sha256(b"".join(self.files.values())).hexdigest()

    def reads_like(self, content: bytes) -> bool:
        """Whether a tokenizer with this main file encodes every text to the same ids, as far as the file shows it."""
        return content == self.content

    def encodes_like(self, other: Tokenizer) -> bool:
        """Whether both encode every document to the same ids, as far as their files show it."""
        decisions = (self.eod, self.special_tokens)
        return decisions == (other.eod, other.special_tokens) and self.reads_like(other.content)

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without any token before or after it."""

    @abstractmethod
    def decode(self, tokens: list[int]) -> str:
        """Text of tokens; bytes that are no character become U+FFFD."""

    @abstractmethod
    def raw(self, token: int) -> bytes:
        """UTF-8 of the text that a token stands for, or the bytes of a part of a character."""

    def piece(self, token: int) -> str:
        """Text of a token, with spaces; <0xAB> for a byte that is part of a character."""
        return _LONE_BYTE.sub(
            lambda found: f"<0x{ord(found[0]) - 0xDC00:02X}>", self.raw(token).decode(errors="surrogateescape")
        )

    @property
    def splits_into_words(self) -> bool:
        """Whether the tokens of a text are the tokens of its :meth:`words` in order."""
        return False

    def words(self, text: str) -> list[str]:
        """Parts of a text, many of which occur often."""
        return [text]

    def written(self, tokens: Sequence[int]) -> Iterator[tuple[str, int]]:
        """Yields the readable text of tokens in order, each with its number of tokens.

        Each is the text of a token, or of several that share a character; <0xAB> for a byte of an incomplete one.
        """
        place = 0
        while place < len(tokens):
            length, text = self._together(tokens, place)
            if text is None:
                length = 1
                text = self.piece(tokens[place])
            yield text, length
            place += length

    def unfinished(self, tokens: Sequence[int]) -> int:
        """Number of tokens at the end whose last character further tokens may complete."""
        place = 0
        while place < len(tokens):
            length, text = self._together(tokens, place)
            if text is None and length:
                return length
            place += length or 1
        return 0

    def _together(self, tokens: Sequence[int], place: int) -> tuple[int, str | None]:
        """The fewest tokens from ``place`` on that are whole characters: how many, and their text.

        Without text: 0 if the first begins with no character, or all that are left if the last character is incomplete.
        """
        decoder = getincrementaldecoder("utf-8")()
        text = ""
        for end in range(place, len(tokens)):
            try:
                text += decoder.decode(self.raw(tokens[end]))
            except UnicodeDecodeError:
                return 0, None
            if not decoder.getstate()[0]:
                return end + 1 - place, text
        return len(tokens) - place, None
