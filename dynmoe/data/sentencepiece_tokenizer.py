"""Sentencepiece models, such as those that data_prep trains."""

from __future__ import annotations

import re
from functools import cached_property
from typing import Any

import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2

from dynmoe.data.tokenizer import Tokenizer
from dynmoe.errors import UserError

TOKENIZER_MODEL = "tokenizer.model"
# A word with its preceding spaces; line breaks are separate. Sentencepiece replaces a space by U+2581.
_split = re.compile("[ \u2581]*[^ \u2581\n]+|\n+|[ \u2581]+").findall


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model whose end-of-sentence piece ends each document.

    Args:
        content: content of the model's file.
        place: name of the file, for messages.
        cure: how the user can fix an unusable file.

    Raises:
        UserError: it is not a sentencepiece model or has no end-of-sentence piece.
    """

    name = "sentencepiece"
    main_file = TOKENIZER_MODEL

    def __init__(self, content: bytes, place: str, cure: str) -> None:
        self.files = {TOKENIZER_MODEL: content}
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=content)
            are_texts = all(isinstance(piece.piece, str) for piece in self._proto.pieces)
        except (RuntimeError, ValueError, DecodeError):  # ValueError: the library's message is not valid UTF-8
            are_texts = False
        if not are_texts:
            raise UserError(f"tokenizer {place} is not a sentencepiece model; {cure}")
        self.eod = self._model.eos_id()
        self.vocab_size = self._model.vocab_size()
        self.unknown = self._model.unk_id()
        self.has_bytes = self._proto.trainer_spec.byte_fallback
        if self.eod < 0:
            raise UserError(f"tokenizer {place} has no end-of-sentence piece; train it with one (data_prep does)")

    @property
    def adds_space(self) -> bool:
        """Whether encoding prepends a space to each text."""
        return self._proto.normalizer_spec.add_dummy_prefix

    @property
    def _proto(self) -> Any:
        return sentencepiece_model_pb2.ModelProto.FromString(self.content)

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text)

    def words(self, text: str) -> list[str]:
        return _split(text)

    def decode(self, tokens: list[int]) -> str:
        return self._model.decode(tokens)

    def raw(self, token: int) -> bytes:
        piece = self._model.id_to_piece(token)
        if self._model.is_byte(token):
            return bytes([int(piece[1:-1], 16)])
        return piece.replace("\u2581", " ").encode()

    def piece(self, token: int) -> str:
        """Text of a token's piece, with spaces; <0xAB> for a byte of a character."""
        return self._model.id_to_piece(token).replace("\u2581", " ")

    @cached_property
    def splits_into_words(self) -> bool:
        """Whether the tokens of a text are the tokens of its words in order.

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
