"""A sentencepiece model as the vocabulary of a GGUF file, from which llama.cpp makes the ids of training.

llama.cpp has two tokenizers for sentencepiece's models (src/llama-vocab.cpp in its repository): ``llama`` merges pairs
by score, as byte-pair encodings do, and ``t5`` looks for the best sum of scores, as unigram models do. Neither does all
that sentencepiece does: what they leave out is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

from sentencepiece import sentencepiece_model_pb2

from dynmoe.data.tokenizer import Tokenizer
from dynmoe.errors import UserError

_SPACE = "\u2581"
_PIECE = sentencepiece_model_pb2.ModelProto.SentencePiece


@dataclass(frozen=True)
class Vocabulary:
    """What a file says about text.

    Attributes:
        model: of llama.cpp's tokenizers.
        pieces: texts of the tokens.
        scores: of each of them.
        types: of each of them; sentencepiece and GGUF number them alike.
        space_before: a space is put before a text.
        spaces_as_one: spaces in a row count as one, and those at the ends not at all.
        charsmap: sentencepiece's table of characters that are replaced; none where it is empty.
    """

    model: str
    pieces: list[str]
    scores: list[float]
    types: list[int]
    space_before: bool
    spaces_as_one: bool
    charsmap: bytes


def vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    """Reads a sentencepiece model.

    Raises:
        UserError: llama.cpp would make other ids of some text.
    """
    model = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.content)
    for problem in _problems(model):
        cure = "prepare the corpus with a tokenizer of data_prep's, or serve the export (python -m dynmoe.hf export)"
        raise UserError(f"tokenizer: {problem}, which llama.cpp cannot do; {cure}")
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
    """Of a token: llama.cpp looks for pieces of the user before spaces are escaped, and for others afterwards."""
    return piece.piece.replace(_SPACE, " ") if piece.type == _PIECE.USER_DEFINED else piece.piece


def _problems(model: Any) -> Iterator[str]:
    """What sentencepiece does with this model, and llama.cpp does not."""
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    bpe, unigram = (trainer.model_type == kind for kind in (trainer.BPE, trainer.UNIGRAM))
    own = [_text(piece) for piece in model.pieces if piece.type == _PIECE.USER_DEFINED]
    if not bpe and not unigram:
        yield "its pieces are whole words or single characters"
    if any(piece.type == _PIECE.UNUSED for piece in model.pieces):
        yield "it has pieces that are not to be used"
    if trainer.treat_whitespace_as_suffix:
        yield "its spaces come behind words"
    if not normalizer.escape_whitespaces:
        yield "its spaces are not escaped"
    for text in (piece.piece for piece in model.pieces if piece.type == _PIECE.USER_DEFINED and " " in piece.piece):
        yield f"its piece {text!r} holds a space, and is never used for that"
    if bpe:
        yield from _problems_of_bpe(trainer, normalizer, own)
    elif unigram:
        yield from _problems_of_unigram(trainer, normalizer, own)


def _problems_of_bpe(trainer: Any, normalizer: Any, own: Sequence[str]) -> Iterator[str]:
    if not trainer.byte_fallback:
        yield "a character without a piece becomes the unknown piece and not bytes"
    if normalizer.precompiled_charsmap:
        yield f"it replaces characters by others ({normalizer.name})"
    if normalizer.remove_extra_whitespaces:
        yield "it makes one of several spaces"
    if own and normalizer.add_dummy_prefix:
        yield f"it puts a space before a text, but none behind pieces of the user ({own[0]!r})"
    for first, second in permutations(own, 2):
        if len(first.encode()) <= len(second.encode()) and _may_overlap(first, second):
            yield f"of its pieces {first!r} and {second!r}, where they overlap, the first in the text counts"


def _problems_of_unigram(trainer: Any, normalizer: Any, own: Sequence[str]) -> Iterator[str]:
    if trainer.byte_fallback:
        yield "a character without a piece becomes bytes in a unigram model"
    if own:
        yield f"it has pieces of the user ({own[0]!r}) in a unigram model"
    if normalizer.add_dummy_prefix != normalizer.remove_extra_whitespaces:
        yield "of a space before a text and spaces in a row as one it has only one"


def _may_overlap(first: str, second: str) -> bool:
    """Whether a text can hold ``second`` from within ``first`` on and beyond its end."""
    return any(second.startswith(first[start:]) for start in range(1, len(first)))
