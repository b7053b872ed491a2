"""Patterns by which byte-level tokenizers split a text into words, and places at which all of them do.

The patterns are facts of public tokenizers, written as the library ``tokenizers`` reads them: there ``$`` is the end of
a line, and ``{1,3}+`` repeats instead of being possessive.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_SPACE = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_REST_OF_GPT2 = r"| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

GPT2 = f"'s|'t|'re|'ve|'m|'ll|'d{_REST_OF_GPT2}"
GPT2_OF_TIKTOKEN = f"'(?:[sdmt]|ll|ve|re){_REST_OF_GPT2}"  # the same words
DIGITS_THEN_GPT2 = rf"\p{{N}}, then {GPT2}"  # no pattern but two steps, which the library has a name for
LLAMA3 = rf"{_WORDS}|\p{{N}}{{1,3}}|{_SYMBOLS}|{_SPACE}"
QWEN2 = rf"{_WORDS}|\p{{N}}|{_SYMBOLS}|{_SPACE}"
# Llama 3's, except that all space at the end of a text is one word, line breaks included.
CL100K = rf"{_WORDS}|\p{{N}}{{1,3}}|{_SYMBOLS}|\s+\z|{_SPACE}"
O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|"
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?|"
    rf"\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACE}"
)
_DIGITS = {"type": "Digits", "individual_digits": True}
_KNOWN = (GPT2, GPT2_OF_TIKTOKEN, DIGITS_THEN_GPT2, LLAMA3, QWEN2, CL100K, O200K)

# Where a word of each of these patterns ends. None has a space after another character, nor space or a symbol after a
# letter or digit, except that an apostrophe may belong to the word before it. None looks back, and they look ahead only
# at the end of space, so the text on one side of such a place does not change the words on the other.
_split = re.compile(r"(?<=[A-Za-z0-9])(?=[\s!-&(-/:-@\[-`{-~])|(?<=\S)(?= )").split


def steps_of(component: Any) -> Iterator[dict[str, Any]]:
    """The steps of a normalizer, pre-tokenizer or decoder of ``tokenizer.json`` in order; none for null."""
    if component is None:
        return
    if component["type"] != "Sequence":
        yield component
        return
    (steps,) = (value for key, value in component.items() if key != "type")
    for step in steps:
        yield from steps_of(step)


def pattern_of(settings: Mapping[str, Any]) -> str | None:
    """The pattern by which a ``tokenizer.json`` splits a text, of which it then takes the bytes.

    Args:
        settings: the parsed file.

    Returns:
        The pattern; None if the tokenizer does something else.
    """
    *others, last = [*steps_of(settings.get("pre_tokenizer"))] or [{"type": ""}]
    if last["type"] != "ByteLevel" or last["add_prefix_space"] or len(others) > 1:
        return None
    if last.get("use_regex", True):
        return GPT2 if not others else DIGITS_THEN_GPT2 if others == [_DIGITS] else None
    return _regex(others[0]) if others else None


def _regex(step: dict[str, Any]) -> str | None:
    """The regular expression by which a step splits a text into matches and what is between them."""
    if step["type"] != "Split" or (step["behavior"], step["invert"]) not in (("Isolated", False), ("Removed", True)):
        return None
    return step["pattern"].get("Regex")


def splitter(settings: Mapping[str, Any], special_tokens: bool) -> Callable[[str], list[str]] | None:
    """A function that splits a text into parts whose ids are, in order, those of the text.

    Added tokens are found in a text before it is split. A text is left whole if it contains one across such a place, or
    the name of a special token, which hides others.

    Args:
        settings: the parsed ``tokenizer.json``.
        special_tokens: whether special tokens are found in a text.

    Returns:
        The function; None if there is none for this tokenizer.
    """
    added = settings.get("added_tokens") or []
    changes = list(steps_of(settings.get("normalizer")))
    found = [token for token in added if special_tokens or not token["special"]]
    across = [token for token in added if len(_split(token["content"])) > 1]
    if (
        settings["model"].get("type") != "BPE"
        or pattern_of(settings) not in _KNOWN
        or any(step["type"] != "NFC" for step in changes)  # which joins marks to what stands before them, nothing else
        or any(token["lstrip"] or token["rstrip"] or token["single_word"] for token in found)
        or any(token["normalized"] for token in across if changes)
    ):
        return None
    if not across:
        return _split
    contains = re.compile("|".join(re.escape(token["content"]) for token in across)).search
    return lambda text: [text] if contains(text) else _split(text)
