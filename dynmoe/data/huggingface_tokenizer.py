"""Tokenizers of Hugging Face's library ``tokenizers``: a ``tokenizer.json`` of any kind."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer as Fast

from dynmoe.data.byte_level import BYTES, to_bytes
from dynmoe.data.tokenizer import Tokenizer
from dynmoe.data.word_patterns import splitter, steps_of
from dynmoe.errors import UserError, first_line

TOKENIZER_JSON = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
_MOST_IDS = 1 << 31  # token files have at most int32
_SPACE = "\u2581"
_BYTE = re.compile("<0x[0-9A-F]{2}>")


class HuggingFaceTokenizer(Tokenizer):
    """A ``tokenizer.json``, with which token ends each document, and whether special tokens in a text become ids.

    The library finds special tokens in a text by default, adds tokens before and after it, and truncates it where the
    file says so; here it does none of this. Added tokens that are not special are found in a text, as the library does.

    Args:
        model: what the library reads (:func:`load`).
        content: content of the file.
        place: name of the file, for messages.
        end_of_text: the token that ends each document.
        special_tokens: whether the name of a special token in a text becomes this token.

    Attributes:
        end_of_text: the token that ends each document.

    Raises:
        UserError: its ids are random; it lacks the token; or text becomes a special token although it should not.
    """

    name = "tokenizers"
    main_file = TOKENIZER_JSON

    def __init__(self, model: Fast, content: bytes, place: str, end_of_text: str, special_tokens: bool = False) -> None:
        self._model = model
        self._place = place
        self.end_of_text = end_of_text
        self.special_tokens = special_tokens
        self.files = {TOKENIZER_JSON: content, TOKENIZER_CONFIG: self._config()}
        self._model.no_truncation()
        self._model.no_padding()
        self._model.encode_special_tokens = not special_tokens
        self._read(self.settings)
        if self.vocab_size > _MOST_IDS:
            raise UserError(f"tokenizer {place}: its largest id is {self.vocab_size - 1}; use one below {_MOST_IDS}")
        eod = self._model.token_to_id(end_of_text)
        if eod is None:
            problem = f"has no token {end_of_text!r}, which is to end each text"
            raise UserError(f"tokenizer {place} {problem}; name one of its tokens (data_prep --end-of-text TOKEN)")
        self.eod = eod
        if not special_tokens:
            self._check_text()

    @property
    def settings(self) -> dict[str, Any]:
        """The parsed file; not kept, because it takes several times the memory of the file."""
        return json.loads(self.content)

    def _read(self, settings: dict[str, Any]) -> None:
        """Finds out how the pieces are written."""
        model = settings["model"]
        if model.get("dropout"):
            raise UserError(f"tokenizer {self._place}: model.dropout makes its ids random; set it to null")
        vocabulary = self._model.get_vocab()
        self.vocab_size = 1 + max(vocabulary.values(), default=-1)
        steps = list(steps_of(settings.get("decoder")))
        self.is_byte_level = any(step["type"] == "ByteLevel" for step in steps)
        self._has_byte_pieces = bool(model.get("byte_fallback"))
        self._escapes_spaces = any(
            step["type"] == "Metaspace" or (step["type"] == "Replace" and step["pattern"] == {"String": _SPACE})
            for step in steps
        )
        every_byte = [f"<0x{byte:02X}>" for byte in range(0x100)] if self._has_byte_pieces else BYTES
        self.has_bytes = (self.is_byte_level or self._has_byte_pieces) and vocabulary.keys() >= set(every_byte)
        unknown = model.get("unk_token")
        self.unknown = model.get("unk_id") if unknown is None else vocabulary.get(unknown)

    def _check_text(self) -> None:
        """Refuses a model that has special tokens in its own vocabulary, where the library does not see them."""
        names = {token: text for token, (text, special) in self.added.items() if special and token != self.unknown}
        for token, text in (names | {self.eod: self.end_of_text}).items():
            if token in self.encode(text):
                problem = f"encodes the text {text!r} as the special token of this name"
                cure = "allow special tokens in text (data_prep --special-tokens)"
                raise UserError(f"tokenizer {self._place} {problem}; {cure}")

    def _config(self) -> bytes:
        """``tokenizer_config.json``: the two decisions, as transformers reads them."""
        config = {
            "tokenizer_class": "TokenizersBackend", "eos_token": self.end_of_text,
            "split_special_tokens": not self.special_tokens, "clean_up_tokenization_spaces": False,
        }  # fmt: skip
        return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()

    @property
    def sha256(self) -> str:
        decisions = json.dumps([self.end_of_text, self.special_tokens]).encode()
        return hashlib.sha256(self.content + decisions).hexdigest()

    def reads_like(self, content: bytes) -> bool:
        """Also if the files differ in their layout, or in what is never used here (see the class)."""
        if content == self.content:
            return True
        try:
            other = json.loads(content)
        except ValueError:
            return False
        return isinstance(other, dict) and _in_use(other) == _in_use(self.settings)

    @cached_property
    def added(self) -> dict[int, tuple[str, bool]]:
        """Content of each added token, and whether it is special, by id."""
        return {token: (own.content, own.special) for token, own in self._model.get_added_tokens_decoder().items()}

    def without_post_processor(self) -> bytes:
        """The file, changed so that the library adds no tokens to a text either; unchanged if it adds none."""
        if not self._model.encode("").ids:
            return self.content
        return json.dumps(self.settings | {"post_processor": None}, indent=2, ensure_ascii=False).encode()

    @property
    def splits_into_words(self) -> bool:
        """Whether the tokens of a text are the tokens of its words in order: for public patterns, on bytes."""
        return self._splitter is not None

    def words(self, text: str) -> list[str]:
        return [text] if self._splitter is None else self._splitter(text)

    @cached_property
    def _splitter(self) -> Callable[[str], list[str]] | None:
        return splitter(self.settings, self.special_tokens) if self.is_byte_level else None

    def encode(self, text: str) -> list[int]:
        # A batch, because only batches can do without the place of each token in the text, which takes longer.
        try:
            (found,) = self._model.encode_batch_fast([text], add_special_tokens=False)
        except Exception as error:  # a character that it lacks, without an unknown token
            problem = f"cannot encode a text ({first_line(error)})"
            raise UserError(f"tokenizer {self._place} {problem}; use one with bytes or an unknown token") from None
        return found.ids

    def decode(self, tokens: list[int]) -> str:
        if self.is_byte_level:  # the library reads added tokens as bytes if they consist of such characters
            return b"".join(map(self.raw, tokens)).decode(errors="replace")
        return self._model.decode(tokens, skip_special_tokens=False)

    def raw(self, token: int) -> bytes:
        piece = self._model.id_to_token(token)
        if piece is None:
            return f"<token {token}>".encode()  # no text has this id
        if token in self.added:
            return piece.encode()
        if self._has_byte_pieces and _BYTE.fullmatch(piece):
            return bytes([int(piece[1:-1], 16)])
        if self._escapes_spaces:
            piece = piece.replace(_SPACE, " ")
        own = to_bytes(piece) if self.is_byte_level else None
        return piece.encode() if own is None else own


def _in_use(settings: dict[str, Any]) -> dict[str, Any]:
    """The parsed file without what is never used here."""
    return {name: own for name, own in settings.items() if name not in ("post_processor", "truncation", "padding")}


def load(content: bytes, place: str, cure: str) -> Fast:
    """Reads a ``tokenizer.json``.

    Raises:
        UserError: it cannot be read.
    """
    # Texts come one by one, so its threads would have nothing to do, but warn of each process that is forked.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        return Fast.from_buffer(content)
    except Exception as error:
        reason = first_line(error).removeprefix("Cannot instantiate Tokenizer from buffer: ")
        raise UserError(f"tokenizer {place} is damaged or not of the library tokenizers ({reason}); {cure}") from None
