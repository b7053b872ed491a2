"""A sentencepiece model as the vocabulary of a GGUF file, with which llama.cpp gives the ids of training.

llama.cpp has two tokenizers for sentencepiece models (src/llama-vocab.cpp in its repository): ``llama`` merges pairs by
score (byte-pair encoding), and ``t5`` maximizes the sum of scores (unigram). Neither implements all of sentencepiece;
a model that needs a missing feature is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from typing import Any

from sentencepiece import sentencepiece_model_pb2

from dynmoe.data.tokenizer import Tokenizer
from dynmoe.errors import UserError

_SPACE = "\u2581"
_PIECE = sentencepiece_model_pb2.ModelProto.SentencePiece


@dataclass(frozen=True)
class Vocabulary:
    """The vocabulary of a GGUF file.

    Attributes:
        model: name of llama.cpp's tokenizer.
        pieces: text of each token.
        scores: score of each token; empty for byte-level tokenizers.
        types: type of each token; sentencepiece and GGUF use the same numbers.
        space_before: whether a space is prepended to a text.
        spaces_as_one: whether runs of spaces become one space, and leading and trailing spaces are removed.
        charsmap: sentencepiece's table of character replacements; may be empty.
        words: name of llama.cpp's way to split a text into words, which only byte-level tokenizers do.
        merges: pairs of pieces that are merged, in order, for byte-level tokenizers.
        composes: whether training normalized text to NFC, which llama.cpp does not do.
    """

    model: str
    pieces: list[str]
    scores: list[float]
    types: list[int]
    space_before: bool
    spaces_as_one: bool
    charsmap: bytes
    words: str = "default"
    merges: list[str] = field(default_factory=list)
    composes: bool = False


def vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    """Converts a sentencepiece model.

    Raises:
        UserError: llama.cpp would give other ids for some text.
    """
    model = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.content)
    for problem in _problems(model):
        cure = "prepare the corpus with a tokenizer from data_prep, or serve the export (python -m dynmoe.hf export)"
        raise UserError(f"tokenizer: {problem}, which llama.cpp does not support; {cure}")
    unigram = model.trainer_spec.model_type == model.trainer_spec.UNIGRAM
    return Vocabulary(
        model="t5" if unigram else "llama",
        pieces=[_text(piece) for piece in model.pieces],
        scores=[piece.score for piece in model.pieces],
        types=[piece.type for piece in model.pieces],
        space_before=model.normalizer_spec.add_dummy_prefix,
        spaces_as_one=model.normalizer_spec.remove_extra_whitespaces,
        charsmap=model.normalizer_spec.precompiled_charsmap,
    )


def _text(piece: Any) -> str:
    """Text of a token. llama.cpp matches user-defined pieces before it escapes spaces, and other pieces afterwards."""
    return piece.piece.replace(_SPACE, " ") if piece.type == _PIECE.USER_DEFINED else piece.piece


def _problems(model: Any) -> Iterator[str]:
    """Features of this model that llama.cpp lacks, as clauses of an error message."""
    trainer = model.trainer_spec
    normalizer = model.normalizer_spec
    bpe, unigram = (trainer.model_type == kind for kind in (trainer.BPE, trainer.UNIGRAM))
    own = [_text(piece) for piece in model.pieces if piece.type == _PIECE.USER_DEFINED]
    if not bpe and not unigram:
        yield "its pieces are whole words or single characters"
    if any(piece.type == _PIECE.UNUSED for piece in model.pieces):
        yield "it has unused pieces"
    if trainer.treat_whitespace_as_suffix:
        yield "it treats spaces as suffixes of words"
    if not normalizer.escape_whitespaces:
        yield "it does not escape spaces"
    for text in (piece.piece for piece in model.pieces if piece.type == _PIECE.USER_DEFINED and " " in piece.piece):
        yield f"its piece {text!r} contains a space and therefore never matches"
    if bpe:
        yield from _problems_of_bpe(trainer, normalizer, own)
    elif unigram:
        yield from _problems_of_unigram(trainer, normalizer, own)


def _problems_of_bpe(trainer: Any, normalizer: Any, own: Sequence[str]) -> Iterator[str]:
    if not trainer.byte_fallback:
        yield "it has no byte fallback: an unknown character becomes the unknown piece"
    if normalizer.precompiled_charsmap:
        yield f"it replaces characters ({normalizer.name})"
    if normalizer.remove_extra_whitespaces:
        yield "it merges runs of spaces"
    if own and normalizer.add_dummy_prefix:
        yield f"it prepends a space to a text, but not after user-defined pieces ({own[0]!r})"
    for first, second in permutations(own, 2):
        if len(first.encode()) <= len(second.encode()) and may_overlap(first, second):
            yield f"where its pieces {first!r} and {second!r} overlap, it uses the one that begins first"


def _problems_of_unigram(trainer: Any, normalizer: Any, own: Sequence[str]) -> Iterator[str]:
    if trainer.byte_fallback:
        yield "it is a unigram model with byte fallback"
    if own:
        yield f"it is a unigram model with user-defined pieces ({own[0]!r})"
    if normalizer.add_dummy_prefix != normalizer.remove_extra_whitespaces:
        yield "it is a unigram model that either prepends a space or merges runs of spaces, but not both"


def may_overlap(first: str, second: str) -> bool:
    """Whether ``second`` can begin inside ``first`` and extend beyond its end."""
    return any(second.startswith(first[start:]) for start in range(1, len(first)))
