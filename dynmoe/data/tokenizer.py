"""A sentencepiece tokenizer."""

from __future__ import annotations

import hashlib
import re
from codecs import getincrementaldecoder
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any

import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2

from dynmoe.data import PREPARE_AGAIN
from dynmoe.errors import UserError

_LONGEST_CHARACTER = 4  # bytes, in UTF-8


class Tokenizer:
    """A sentencepiece model whose end-of-sentence piece ends each document.

    Args:
        cure: how the user can fix an unusable file.

    Raises:
        UserError: the file cannot be read, is not a sentencepiece model or has no end-of-sentence piece.
    """

    def __init__(self, path: str | Path, cure: str = PREPARE_AGAIN) -> None:
        try:
            self.content = Path(path).read_bytes()
            self._model = sentencepiece.SentencePieceProcessor(model_proto=self.content)
            are_texts = all(isinstance(piece.piece, str) for piece in self._proto.pieces)
        except OSError as error:
            raise UserError(f"tokenizer {path} cannot be read: {error.strerror}; {cure}") from None
        except (RuntimeError, ValueError, DecodeError):  # ValueError: the library's message is not valid UTF-8
            are_texts = False
        if not are_texts:
            raise UserError(f"tokenizer {path} is not a sentencepiece model; {cure}")
        self.sha256 = hashlib.sha256(self.content).hexdigest()
        self.eod: int = self._model.eos_id()
        self.vocab_size: int = self._model.vocab_size()
        if self.eod < 0:
            raise UserError(f"tokenizer {path} has no end-of-sentence piece; train it with one (data_prep does)")

    @property
    def unknown(self) -> int:
        """Id of the unknown piece."""
        return self._model.unk_id()

    @property
    def has_bytes(self) -> bool:
        """Whether characters without a piece are encoded as bytes; then the unknown piece is never used."""
        return self._proto.trainer_spec.byte_fallback

    @property
    def adds_space(self) -> bool:
        """Whether encoding prepends a space to each text."""
        return self._proto.normalizer_spec.add_dummy_prefix

    @property
    def _proto(self) -> Any:
        return sentencepiece_model_pb2.ModelProto.FromString(self.content)

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text)

    def decode(self, tokens: list[int]) -> str:
        return self._model.decode(tokens)

    def piece(self, token: int) -> str:
        """Text of a token's piece, with spaces; <0xAB> for a byte of a character."""
        return self._model.id_to_piece(token).replace("\u2581", " ")

    def written(self, tokens: Sequence[int]) -> Iterator[tuple[str, int]]:
        """Yields the readable text of tokens in order, each with its number of tokens.

        Each is the text of a piece, or a character whose bytes are tokens; <0xAB> for a byte of an incomplete
        character.
        """
        place = 0
        while place < len(tokens):
            text = self.piece(tokens[place])
            length = 1
            raw = b""
            for byte in map(self._byte, tokens[place : place + _LONGEST_CHARACTER]):
                if not byte:
                    break
                raw += byte
                with suppress(UnicodeDecodeError):  # incomplete so far
                    text = raw.decode()
                    length = len(raw)
                    break
            yield text, length
            place += length

    def unfinished(self, tokens: Sequence[int]) -> int:
        """Number of tokens at the end that are bytes of a character which further tokens may complete."""
        last = takewhile(len, map(self._byte, reversed(tokens[-_LONGEST_CHARACTER:])))
        decoder = getincrementaldecoder("utf-8")("replace")
        decoder.decode(b"".join([*last][::-1]))
        return len(decoder.getstate()[0])

    def _byte(self, token: int) -> bytes:
        """Byte that a token stands for; empty for text."""
        return bytes([int(self._model.id_to_piece(token)[1:-1], 16)]) if self._model.is_byte(token) else b""

    @cached_property
    def splits_into_words(self) -> bool:
        """Whether the tokens of a text are the tokens of its words in order (words: see ``data_prep.encode``).

        True for byte-pair encodings that do not normalize the text and have no piece that spans two words. Others need
        whole texts: unigram models add up scores from the beginning.
        """
        model = self._proto
        normalizer = model.normalizer_spec
        trainer = model.trainer_spec
        leaves_text = normalizer.escape_whitespaces and not (
            normalizer.add_dummy_prefix or normalizer.remove_extra_whitespaces or normalizer.precompiled_charsmap
        )
        crossing = re.compile("[^\u2581]\u2581|[^\\n]\\n|\\n[^\\n]")
        return (
            trainer.model_type == trainer.BPE
            and trainer.byte_fallback  # else consecutive unknown characters become one token, across words
            and leaves_text
            and not trainer.treat_whitespace_as_suffix
            and not any(piece.type == piece.USER_DEFINED or crossing.search(piece.piece) for piece in model.pieces)
        )
