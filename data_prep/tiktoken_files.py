"""Converts tiktoken files to a ``tokenizer.json`` with the same ids, so that only data_prep knows tiktoken.

A tiktoken file is a list of tokens with their ranks. The pattern that splits a text, and the special tokens, are facts
of the encoding that stand elsewhere: here, for the public encodings that the file's SHA-256 identifies.
"""

from __future__ import annotations

import binascii
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

from tokenizers import Regex

from dynmoe.data.byte_level import to_characters
from dynmoe.data.corpus import MANIFEST
from dynmoe.data.huggingface_tokenizer import TOKENIZER_CONFIG, HuggingFaceTokenizer, load
from dynmoe.data.tokenizer import Tokenizer
from dynmoe.data.tokenizer_files import (
    beside,
    end_of_text_of,
    find_tokenizer,
    is_tiktoken,
    open_tokenizer,
)
from dynmoe.data.word_patterns import CL100K, GPT2_OF_TIKTOKEN, LLAMA3, O200K, QWEN2
from dynmoe.errors import UserError, first_line

_KINDS = "use a sentencepiece model, a tokenizer.json or a tiktoken file"
_END = "<|endoftext|>"

PATTERNS = {"gpt2": GPT2_OF_TIKTOKEN, "cl100k": CL100K, "o200k": O200K, "llama3": LLAMA3, "qwen": QWEN2}
# What the two libraries read differently in a pattern, and how to write it; characters and classes are left out.
_UNLIKE = {
    r"\{\d*,?\d*\}\+": "X{1,3}+ repeats X{1,3} there; write (?>X{1,3})",
    r"[$^]": r"$ and ^ are the ends of a line there; write \z and \A",
    r".\(\?[a-z-]+\)": "(?i) extends over the alternatives that follow there; write (?i:X)",
}
# An escaped character or a class; a "]" that comes first in a class is one of its characters.
_CHARACTER = re.compile(r"\\[pP]\{\^?\w+\}|\\.|\[\^?\]?(?:\\.|[^\]\\])*\]")


@dataclass(frozen=True)
class Encoding:
    """A public encoding.

    Attributes:
        pattern: key of ``PATTERNS``.
        special: ids of its special tokens.
    """

    pattern: str
    special: dict[str, int]


def _llama3() -> dict[str, int]:
    """The 256 special tokens of Llama 3, of which later versions rename reserved ones."""
    named = {0: "begin_of_text", 1: "end_of_text", 6: "start_header_id", 7: "end_header_id", 9: "eot_id"}
    others = (f"reserved_special_token_{number}" for number in range(256))
    return {f"<|{named[place] if place in named else next(others)}|>": 128_000 + place for place in range(256)}


# Public files by their SHA-256.
ENCODINGS = {
    "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930": Encoding("gpt2", {_END: 50_256}),  # r50k_base
    "94b5ca7dff4d00767bc256fdd1b27e5b17361d7b8a5f968547f9f23eb70d2069": Encoding("gpt2", {_END: 50_256}),  # p50k_base
    "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7": Encoding("cl100k", {
        _END: 100_257, "<|fim_prefix|>": 100_258, "<|fim_middle|>": 100_259, "<|fim_suffix|>": 100_260,
        "<|endofprompt|>": 100_276,
    }),
    "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d": Encoding("o200k", {
        _END: 199_999, "<|endofprompt|>": 200_018,
    }),
    "82e9d31979e92ab929cd544440f129d9ecd797b69e327f80f17e1c50d5551b55": Encoding("llama3", _llama3()),
}  # fmt: skip


def read_tokenizer(
    name: str, end_of_text: str | None = None, special_tokens: bool | None = None, pattern: str | None = None
) -> Tokenizer:
    """Opens the tokenizer of ``--tokenizer``: of a file or a directory, of any kind.

    Args:
        name: the file or directory.
        end_of_text: the token that ends each document; None: what the tokenizer says.
        special_tokens: whether special tokens in a text become ids; None: as its corpus or run does, else not.
        pattern: how a tiktoken file splits text: a key of ``PATTERNS`` or a regular expression; None: it is known.

    Raises:
        UserError: it cannot be used.
    """
    file = _tiktoken_file(Path(name))
    if file is not None:
        return convert(file, end_of_text, bool(special_tokens), pattern)
    if pattern is not None:
        raise UserError(f"--tiktoken-pattern {pattern!r}: {name} is not a tiktoken file; remove the option")
    if special_tokens is None and not _is_ours(Path(name)):
        special_tokens = False  # whatever its files say about prompts: text to train on is text
    return open_tokenizer(name, _KINDS, end_of_text, special_tokens)


def _is_ours(path: Path) -> bool:
    """Whether a tokenizer is that of a corpus or a run, which have decided about special tokens."""
    folder = path if path.is_dir() else path.parent
    return any((folder / name).is_file() for name in (MANIFEST, "config.yaml"))


def _tiktoken_file(path: Path) -> Path | None:
    """The tiktoken file that is named, or that is the only tokenizer of a directory."""
    found = find_tokenizer(path) if path.is_dir() else path
    if found is None:
        found = next(iter(sorted([*path.glob("*.tiktoken"), *path.glob("tiktoken.model")])), None)
    return found if found is not None and found.is_file() and is_tiktoken(found.read_bytes()) else None


def convert(file: Path, end_of_text: str | None, special_tokens: bool, pattern: str | None) -> HuggingFaceTokenizer:
    """Converts a tiktoken file; arguments as of :func:`read_tokenizer`.

    Raises:
        UserError: it is damaged, or its pattern is not known or cannot be used.
    """
    content = file.read_bytes()
    ranks = _ranks(file, content)
    known = ENCODINGS.get(hashlib.sha256(content).hexdigest())
    if pattern is None:
        if known is None:
            cure = f"pass --tiktoken-pattern {'|'.join(PATTERNS)}, or a regular expression"
            raise UserError(f"tokenizer {file}: the pattern by which it splits text is not known; {cure}")
        pattern = known.pattern
    special = known.special if known else _special_tokens(file, end_of_text, 1 + max(ranks.values()))
    made = json.dumps(_settings(ranks, _regex(pattern), special), ensure_ascii=False).encode()
    model = load(made, str(file), _KINDS)
    if end_of_text is None:
        end_of_text = end_of_text_of(file, special)
    return HuggingFaceTokenizer(model, made, str(file), end_of_text, special_tokens)


def _ranks(file: Path, content: bytes) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[binascii.a2b_base64(token, strict_mode=True)] = int(rank)
        except ValueError:
            cure = "copy the file again"
            raise UserError(f"tokenizer {file}: line {number} is not a token in base64 and its rank; {cure}") from None
    missing = sum(bytes([byte]) not in ranks for byte in range(0x100))
    if missing or len(set(ranks.values())) < len(ranks) or min(ranks.values()) < 0:
        problem = f"lacks {missing} of the 256 bytes" if missing else "has two tokens of one rank, or a negative rank"
        raise UserError(f"tokenizer {file} {problem}; copy the file again")
    return ranks


def _special_tokens(file: Path, end_of_text: str | None, first: int) -> dict[str, int]:
    """Special tokens of an encoding that is not public: those that its directory lists, or one that ends a text."""
    listed = beside(file, TOKENIZER_CONFIG).get("added_tokens_decoder")
    if not listed:
        return {end_of_text or _END: first}
    try:
        return {str(token["content"]): int(number) for number, token in listed.items()}
    except (AttributeError, KeyError, TypeError, ValueError):
        problem = "added_tokens_decoder does not list tokens by id"
        raise UserError(f"tokenizer {file.parent / TOKENIZER_CONFIG}: {problem}; repair or remove it") from None


def _regex(pattern: str) -> str:
    if pattern in PATTERNS:
        return PATTERNS[pattern]
    if re.fullmatch(r"\w+", pattern):  # as an expression it would split texts at this word alone
        known = ", ".join(PATTERNS)
        raise UserError(f"--tiktoken-pattern {pattern}: no such pattern; use {known}, or a regular expression")
    bare = _CHARACTER.sub("x", pattern)
    for unlike, cure in _UNLIKE.items():
        if re.search(unlike, bare):
            raise UserError(f"--tiktoken-pattern {pattern!r}: the library tokenizers reads this differently: {cure}")
    try:
        Regex(pattern)
    except Exception as error:
        raise UserError(
            f"--tiktoken-pattern {pattern!r}: is neither {', '.join(PATTERNS)} nor a regular expression "
            f"({first_line(error)}); correct it"
        ) from None
    return pattern


def _settings(ranks: Mapping[bytes, int], pattern: str, special: dict[str, int]) -> dict[str, Any]:
    """Content of the ``tokenizer.json``."""
    ordered = sorted(ranks, key=ranks.__getitem__)
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    bytes_alone = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [
            {"id": number, "content": token, **plain}
            for token, number in sorted(special.items(), key=lambda own: own[1])
        ],
        "normalizer": None, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, bytes_alone]},
        "post_processor": None, "decoder": bytes_alone,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
            "ignore_merges": True,  # tiktoken too looks for a whole word first
            # The library numbers added tokens that are not in the vocabulary as it likes.
            "vocab": {to_characters(token): ranks[token] for token in ordered} | special,
            "merges": [[to_characters(half) for half in halves] for halves in _merges(ordered, ranks)],
        },
    }  # fmt: skip


def _merges(ordered: list[bytes], ranks: Mapping[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """The pair that each token is merged from, by rank.

    Tiktoken merges any two neighbors that together are a token, the lowest rank first. Inside a text this joins the
    bytes of a token in the same order as when it stands alone, as long as nothing joins across its ends. So at most one
    pair of neighbors ever becomes this token: the last one when it is encoded alone. A token that does not come about
    in this way is only found as a whole word.
    """
    for token in ordered:
        parts = [token[place : place + 1] for place in range(len(token))]
        while len(parts) > 2:
            pairs = [ranks.get(parts[place] + parts[place + 1], inf) for place in range(len(parts) - 1)]
            place = pairs.index(min(pairs))
            if pairs[place] == inf:
                break
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
        if len(parts) == 2:
            yield parts[0], parts[1]
