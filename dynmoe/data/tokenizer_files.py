"""Opens the tokenizer of a file or directory, whatever its kind."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from dynmoe.data import PREPARE_AGAIN
from dynmoe.data.huggingface_tokenizer import TOKENIZER_CONFIG, TOKENIZER_JSON, HuggingFaceTokenizer, load
from dynmoe.data.sentencepiece_tokenizer import TOKENIZER_MODEL, SentencePieceTokenizer
from dynmoe.data.tokenizer import Tokenizer
from dynmoe.errors import UserError, first_line

# The files of a tokenizer; a corpus or a run has either the first or the other two.
TOKENIZER_FILES = (TOKENIZER_MODEL, TOKENIZER_JSON, TOKENIZER_CONFIG)
_JSON = re.compile(rb"(\xef\xbb\xbf)?\s*\{\s*[\"}]")
_TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")
_SPECIAL_TOKENS_MAP = "special_tokens_map.json"
# Tokens by which public models end a text; the end of a message in a chat is another token.
_WELL_KNOWN = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<｜end▁of▁sentence｜>")


def find_tokenizer(directory: Path) -> Path | None:
    """The main file of a directory's tokenizer; None if it has none.

    If it has both kinds, as exports and older Llama checkpoints do, ``tokenizer.json`` was made from the sentencepiece
    model, which is used; except that Llama 3 calls a tiktoken file ``tokenizer.model``.
    """
    model = directory / TOKENIZER_MODEL
    others = directory / TOKENIZER_JSON
    if model.is_file() and not (others.is_file() and is_tiktoken(model.read_bytes())):
        return model
    return others if others.is_file() else None


def is_tiktoken(content: bytes) -> bool:
    """Whether this is a tiktoken file: lines of a token in base64 and its rank."""
    return _TIKTOKEN.match(content) is not None


def open_tokenizer(
    path: str | Path, cure: str = PREPARE_AGAIN, end_of_text: str | None = None, special_tokens: bool | None = None
) -> Tokenizer:
    """Opens a tokenizer of either kind, which its content tells.

    Args:
        path: its main file, or a directory with it.
        cure: how the user can fix an unusable file.
        end_of_text: the token that ends each document; default: what the files beside it say, or the one that is known.
        special_tokens: whether special tokens in a text become ids; default: as the files beside it say, or not.

    Raises:
        UserError: there is none, it cannot be read or used, or it does not say which token ends a document.
    """
    path = Path(path)
    if path.is_dir():
        found = find_tokenizer(path)
        if found is None:
            raise UserError(f"tokenizer {path} has no {TOKENIZER_MODEL} and no {TOKENIZER_JSON}; {cure}")
        path = found
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"tokenizer {path} cannot be read: {error.strerror}; {cure}") from None
    if is_tiktoken(content):
        problem = "is a tiktoken file, which lacks the pattern that splits a text"
        raise UserError(f"tokenizer {path} {problem}; {cure}")
    if _JSON.match(content):
        return _huggingface(path, content, cure, end_of_text, special_tokens)
    if end_of_text is not None or special_tokens:
        option = "--special-tokens" if end_of_text is None else f"--end-of-text {end_of_text!r}"
        problem = f"applies to {TOKENIZER_JSON} and tiktoken files; {path} is another file"
        raise UserError(f"{option}: {problem}; remove the option, or name another --tokenizer")
    return SentencePieceTokenizer(content, str(path), cure)


def _huggingface(
    path: Path, content: bytes, cure: str, end_of_text: str | None, special_tokens: bool | None
) -> HuggingFaceTokenizer:
    model = load(content, str(path), cure)
    if end_of_text is None:
        end_of_text = end_of_text_of(path, model.get_vocab().keys())
    if special_tokens is None:
        special_tokens = beside(path, TOKENIZER_CONFIG).get("split_special_tokens") is False
    return HuggingFaceTokenizer(model, content, str(path), end_of_text, special_tokens)


def end_of_text_of(path: Path, vocabulary: Collection[str]) -> str:
    """The token that ends a document: the one that the files beside the tokenizer name, or the only well-known one.

    Args:
        path: main file of the tokenizer.
        vocabulary: its tokens.

    Raises:
        UserError: neither tells.
    """
    for name in (TOKENIZER_CONFIG, _SPECIAL_TOKENS_MAP):
        token = beside(path, name).get("eos_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            return token
    known = [token for token in _WELL_KNOWN if token in vocabulary]
    if len(known) == 1:
        return known[0]
    problem = f"has several tokens that may end a text ({', '.join(known)})" if known else "has no end-of-text token"
    cure = f"name one with data_prep --end-of-text TOKEN, or as eos_token in {TOKENIZER_CONFIG} beside it"
    raise UserError(f"tokenizer {path} {problem}; {cure}")


def beside(path: Path, name: str) -> dict[str, Any]:
    """Content of a JSON file beside a tokenizer; empty if there is none.

    Raises:
        UserError: it cannot be read.
    """
    file = path.parent / name
    try:
        found = json.loads(file.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"tokenizer {file} cannot be read ({first_line(error)}); repair or remove it") from None
    if not isinstance(found, dict):
        raise UserError(f"tokenizer {file} is not a JSON object; repair or remove it")
    return found
