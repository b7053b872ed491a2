"""A byte-level ``tokenizer.json`` as the vocabulary of a GGUF file, with which llama.cpp gives the ids of training.

llama.cpp has one tokenizer of this kind, ``gpt2``. How it splits a text into words before it merges their bytes is not
in the file, which only names one of the ways that are built in (src/llama-vocab.cpp in its repository).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from itertools import permutations
from typing import Any

from tokenizers import models

from dynmoe.data.byte_level import BYTES
from dynmoe.data.huggingface_tokenizer import HuggingFaceTokenizer
from dynmoe.data.word_patterns import DIGITS_THEN_GPT2, GPT2, GPT2_OF_TIKTOKEN, LLAMA3, QWEN2, pattern_of, steps_of
from dynmoe.errors import UserError
from dynmoe.hf.gguf_vocabulary import Vocabulary, may_overlap

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # GGUF's types of tokens
# Names in llama.cpp by pattern. That of o200k is not among them: llama.cpp only approximates it.
_NAMES = {
    GPT2: "gpt-2", GPT2_OF_TIKTOKEN: "gpt-2", DIGITS_THEN_GPT2: "smollm", QWEN2: "qwen2", LLAMA3: "dbrx",
}  # fmt: skip
_LOOKS_FOR_WORDS = {"dbrx": "llama-bpe"}  # the same pattern, but a word that is a token is not merged from its bytes


def byte_level_vocabulary(tokenizer: HuggingFaceTokenizer) -> Vocabulary:
    """Converts a byte-level byte-pair encoding.

    Raises:
        UserError: llama.cpp would give other ids for some text, other than text that is not in NFC.
    """
    settings = tokenizer.settings
    name = _name(settings)
    problem = next(_problems(tokenizer, settings), None)
    if problem is None and name is None:
        problem = "it splits text into words by rules of its own"
    if problem is not None or name is None:
        cure = "serve the export (python -m dynmoe.hf export), or prepare the corpus with another tokenizer"
        raise UserError(f"tokenizer: {problem}, which llama.cpp does not support; {cure}")
    model = settings["model"]
    pieces = {token: (piece, _NORMAL) for piece, token in model["vocab"].items()}
    for token, (text, special) in tokenizer.added.items():
        pieces[token] = (text, _CONTROL if special else _USER_DEFINED)
    listed = [pieces.get(token, (f"[PAD{token}]", _UNUSED)) for token in range(tokenizer.vocab_size)]
    return Vocabulary(
        model="gpt2", pieces=[piece for piece, _ in listed], scores=[], types=[kind for _, kind in listed],
        space_before=False, spaces_as_one=False, charsmap=b"", words=name,
        composes=any(steps_of(settings.get("normalizer"))),
        merges=[merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]],
    )  # fmt: skip


def _name(settings: Mapping[str, Any]) -> str | None:
    """How llama.cpp calls the way in which this tokenizer splits a text into words; None if it does not have it."""
    name = _NAMES.get(pattern_of(settings) or "")
    return _LOOKS_FOR_WORDS.get(name, name) if name and settings["model"].get("ignore_merges") else name


def _problems(tokenizer: HuggingFaceTokenizer, settings: Mapping[str, Any]) -> Iterator[str]:
    """Features of this tokenizer that llama.cpp lacks, as clauses of an error message."""
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
    own = [token for token in settings.get("added_tokens") or [] if not token["special"]]
    for token in own:
        if token["lstrip"] or token["rstrip"] or token["single_word"]:
            yield f"its added token {token['content']!r} depends on what stands beside it"
    for first, second in permutations((token["content"] for token in own), 2):
        if may_overlap(first, second):
            yield f"where its added tokens {first!r} and {second!r} overlap, it uses the one that begins first"
    if model.get("ignore_merges") and _name(settings) not in _LOOKS_FOR_WORDS.values():
        yield from _unmerged(model, tokenizer.added)


def _unmerged(model: dict[str, Any], added: Collection[int]) -> Iterator[str]:
    """A token that is only found as a whole word, because merging its bytes gives other tokens."""
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    merging = models.BPE(model["vocab"], merges)
    for piece, token in model["vocab"].items():
        if token not in added and [found.id for found in merging.tokenize(piece)] != [token]:
            yield f"its token {piece!r} is only found as a whole word (ignore_merges)"
            return
