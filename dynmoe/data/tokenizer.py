"""Sentencepiece, under the names that Megatron's datasets ask for."""

from __future__ import annotations

import hashlib
from pathlib import Path

import sentencepiece

from dynmoe.errors import UserError


class Tokenizer:
    """A sentencepiece model; the end-of-sentence piece ends each document.

    Raises:
        UserError: the file cannot be read, is no sentencepiece model or has no end-of-sentence piece.
    """

    def __init__(self, path: str | Path) -> None:
        try:
            self.content = Path(path).read_bytes()
            self._model = sentencepiece.SentencePieceProcessor(model_proto=self.content)
        except OSError as error:
            raise UserError(f"tokenizer {path} cannot be read: {error.strerror}; prepare the corpus again") from None
        except RuntimeError:
            raise UserError(f"tokenizer {path} is not a sentencepiece model; prepare the corpus again") from None
        self.sha256 = hashlib.sha256(self.content).hexdigest()
        self.eod: int = self._model.eos_id()
        self.vocab_size: int = self._model.vocab_size()
        if self.eod < 0:
            raise UserError(f"tokenizer {path} has no end-of-sentence piece; train it with one (data_prep does)")

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text)

    def decode(self, tokens: list[int]) -> str:
        return self._model.decode(tokens)

    def piece(self, token: int) -> str:
        """The piece of text that a token stands for, spaces as such; <0xAB> for a byte of a character."""
        return self._model.id_to_piece(token).replace("\u2581", " ")

    @property
    def unique_identifiers(self) -> dict[str, str]:
        """What Megatron's index cache depends on."""
        return {"class": type(self).__name__, "sha256": self.sha256}
