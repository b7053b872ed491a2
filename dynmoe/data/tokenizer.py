"""Sentencepiece, under the names that Megatron's datasets ask for."""

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

from dynmoe.errors import UserError

_LONGEST_CHARACTER = 4  # bytes, in UTF-8


class Tokenizer:
    """A sentencepiece model; the end-of-sentence piece ends each document.

    Args:
        path: of the file.
        cure: what to do about a file that is none.

    Raises:
        UserError: the file cannot be read, is no sentencepiece model or has no end-of-sentence piece.
    """

    def __init__(self, path: str | Path, cure: str = "prepare the corpus again") -> None:
        try:
            self.content = Path(path).read_bytes()
            self._model = sentencepiece.SentencePieceProcessor(model_proto=self.content)
            are_texts = all(isinstance(piece.piece, str) for piece in self._proto.pieces)
        except OSError as error:
            raise UserError(f"tokenizer {path} cannot be read: {error.strerror}; {cure}") from None
        except (RuntimeError, ValueError, DecodeError):  # the second: its words on what is wrong are not UTF-8
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
        """Id of the piece for what has none."""
        return self._model.unk_id()

    @property
    def has_bytes(self) -> bool:
        """Whether characters without a piece are written as bytes; the unknown piece is then never used."""
        return self._proto.trainer_spec.byte_fallback

    @property
    def adds_space(self) -> bool:
        """Whether a space is put before every text."""
        return self._proto.normalizer_spec.add_dummy_prefix

    @property
    def _proto(self) -> Any:
        return sentencepiece_model_pb2.ModelProto.FromString(self.content)

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text)

    def decode(self, tokens: list[int]) -> str:
        return self._model.decode(tokens)

    def piece(self, token: int) -> str:
        """The piece of text that a token stands for, spaces as such; <0xAB> for a byte of a character."""
        return self._model.id_to_piece(token).replace("\u2581", " ")

    def written(self, tokens: Sequence[int]) -> Iterator[tuple[str, int]]:
        """What tokens are read as, in their order, each with how many of them it takes.

        That is a piece of text, or a character whose bytes are tokens; <0xAB> for a byte of no whole character.
        """
        place = 0
        while place < len(tokens):
            text, length, raw = self.piece(tokens[place]), 1, b""
            for byte in map(self._byte, tokens[place : place + _LONGEST_CHARACTER]):
                if not byte:
                    break
                raw += byte
                with suppress(UnicodeDecodeError):  # the beginning of a character is none
                    text, length = raw.decode(), len(raw)
                    break
            yield text, length
            place += length

    def unfinished(self, tokens: Sequence[int]) -> int:
        """How many tokens at the end are bytes of a character that further ones may complete."""
        last = takewhile(len, map(self._byte, reversed(tokens[-_LONGEST_CHARACTER:])))
        decoder = getincrementaldecoder("utf-8")("replace")
        decoder.decode(b"".join([*last][::-1]))
        return len(decoder.getstate()[0])

    def _byte(self, token: int) -> bytes:
        """The byte that a token stands for; nothing where it stands for text."""
        return bytes([int(self._model.id_to_piece(token)[1:-1], 16)]) if self._model.is_byte(token) else b""

    @cached_property
    def splits_into_words(self) -> bool:
        """Whether a text has the tokens of its words, one after the other (words: see ``data_prep.encode``).

        True of byte-pair encodings that leave the text as it is and have no piece that reaches from one word into the
        next. Others may only be applied to whole texts: unigram models add up scores from the beginning.
        """
        model = self._proto
        normalizer, trainer = model.normalizer_spec, model.trainer_spec
        leaves_text = normalizer.escape_whitespaces and not (
            normalizer.add_dummy_prefix or normalizer.remove_extra_whitespaces or normalizer.precompiled_charsmap
        )
        crossing = re.compile("[^\u2581]\u2581|[^\\n]\\n|\\n[^\\n]")
        return (
            trainer.model_type == trainer.BPE
            and trainer.byte_fallback  # else unknown characters in a row become one token, across words
            and leaves_text
            and not trainer.treat_whitespace_as_suffix
            and not any(piece.type == piece.USER_DEFINED or crossing.search(piece.piece) for piece in model.pieces)
        )

    @property
    def unique_identifiers(self) -> dict[str, str]:
        """What Megatron's index cache depends on."""
        return {"class": type(self).__name__, "sha256": self.sha256}
