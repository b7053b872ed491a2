"""A byte-level ``tokenizer.json`` as the vocabulary of a GGUF file, with which llama.cpp gives the ids of training.

llama.cpp has one tokenizer of this kind, ``gpt2``. How it splits a text into words before it merges their bytes is not
in the file, which only names one of the ways that are built in (src/llama-vocab.cpp in its repository).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import permutations
from typing import Any

from tokenizers import models

from dynmoe.data.byte_level import BYTES
from dynmoe.data.huggingface_tokenizer import HuggingFaceTokenizer, steps_of
from dynmoe.errors import UserError
from dynmoe.hf.gguf_vocabulary import Vocabulary, may_overlap

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # GGUF's types of tokens
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# Names in llama.cpp by pattern. The regular expression of o200k is not among them: llama.cpp only approximates it.
_NAMES = {
    _GPT2: "gpt-2",
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+": "gpt-2",
    rf"{_WORDS}\p{{N}}{_REST}": "qwen2",
    rf"{_WORDS}\p{{N}}{{1,3}}{_REST}": "dbrx",
}
_LOOKS_FOR_WORDS = {"dbrx": "llama-bpe"}  # the same pattern, but a word that is a token is not merged from its bytes
_DIGITS = "smollm"  # each digit by itself, then as gpt-2


def byte_level_vocabulary(tokenizer: HuggingFaceTokenizer) -> Vocabulary:
    """Converts a byte-level byte-pair encoding.

    Raises:
        UserError: llama.cpp would give other ids for some text, other than text that is not in NFC.
    """
    name = _name(tokenizer)
    problem = next(_problems(tokenizer), None)
    if problem is None and name is None:
        problem = "it splits text into words by rules of its own"
    if problem is not None or name is None:
        cure = "serve the export (python -m dynmoe.hf export), or prepare the corpus with another tokenizer"
        raise UserError(f"tokenizer: {problem}, which llama.cpp does not support; {cure}")
    model = tokenizer.settings["model"]
    pieces = {token: (piece, _NORMAL) for piece, token in model["vocab"].items()}
    for token, (text, special) in tokenizer.added.items():
        pieces[token] = (text, _CONTROL if special else _USER_DEFINED)
    listed = [pieces.get(token, (f"[PAD{token}]", _UNUSED)) for token in range(tokenizer.vocab_size)]
    return Vocabulary(
        model="gpt2", pieces=[piece for piece, _ in listed], scores=[], types=[kind for _, kind in listed],
        space_before=False, spaces_as_one=False, charsmap=b"", words=name,
        composes=any(steps_of(tokenizer.settings.get("normalizer"))),
        merges=[merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]],
    )  # fmt: skip


def _name(tokenizer: HuggingFaceTokenizer) -> str | None:
    """How llama.cpp calls the way in which this tokenizer splits a text into words; None if it does not have it."""
    steps = list(steps_of(tokenizer.settings.get("pre_tokenizer")))
    if not steps or steps[-1]["type"] != "ByteLevel" or steps[-1]["add_prefix_space"]:
        return None
    if steps[-1].get("use_regex", True):
        digits = {"type": "Digits", "individual_digits": True}
        return {0: "gpt-2", 1: _DIGITS if steps[0] == digits else None}.get(len(steps) - 1)
    name = _NAMES.get(_pattern(steps[0])) if len(steps) == 2 else None
    return _LOOKS_FOR_WORDS.get(name, name) if name and tokenizer.settings["model"].get("ignore_merges") else name


def _pattern(step: dict[str, Any]) -> str:
    """The regular expression by which a step splits a text; empty if it does something else."""
    all_text = (step.get("behavior"), step.get("invert")) in (("Isolated", False), ("Removed", True))
    return step["pattern"].get("Regex", "") if step["type"] == "Split" and all_text else ""


def _problems(tokenizer: HuggingFaceTokenizer) -> Iterator[str]:
    """Features of this tokenizer that llama.cpp lacks, as clauses of an error message."""
    settings = tokenizer.settings
    model = settings["model"]
    if model.get("type") != "BPE" or not tokenizer.is_byte_level:
        yield "it is not a byte-level byte-pair encoding"
        return
    if not model["vocab"].keys() >= BYTES.keys():
        yield "it lacks some of the 256 bytes"
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        yield "it marks pieces inside or at the end of words"
    if any(step["type"] != "NFC" for step in steps_of(settings.get("normalizer"))):
        yield "it changes the text (normalizer)"
    own = [token for token in settings["added_tokens"] if not token["special"]]
    for token in own:
        if token["lstrip"] or token["rstrip"] or token["single_word"]:
            yield f"its added token {token['content']!r} depends on what stands beside it"
    for first, second in permutations((token["content"] for token in own), 2):
        if may_overlap(first, second):
            yield f"where its added tokens {first!r} and {second!r} overlap, it uses the one that begins first"
    if model.get("ignore_merges") and _name(tokenizer) not in _LOOKS_FOR_WORDS.values():
        yield from _unmerged(model, tokenizer.added)


def _unmerged(model: dict[str, Any], added: Collection[int]) -> Iterator[str]:
    """A token that is only found as a whole word, because merging its bytes gives other tokens."""
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    merging = models.BPE(model["vocab"], merges)
    for piece, token in model["vocab"].items():
        if token not in added and [found.id for found in merging.tokenize(piece)] != [token]:
            yield f"its token {piece!r} is only found as a whole word (ignore_merges)"
            return
