"""Training of a tokenizer."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain

import sentencepiece

from data_prep.merge import Refusals
from data_prep.recipe import Recipe
from data_prep.sources import BLANK, RefusedError, read_unit, text_of
from data_prep.units import Unit
from dynmoe.errors import UserError

_LONGEST_LINE = 1000  # characters; sentencepiece's limit is 4192 bytes


def train_tokenizer(recipe: Recipe, units: Sequence[Unit]) -> bytes:
    """A BPE model with byte fallback; the bytes of a .model file.

    It gives every text back unchanged, but for U+2581, the character that stands for a space in its pieces.

    Raises:
        UserError: too little text for the vocabulary.
    """
    model = io.BytesIO()
    refusals = Refusals()
    lines = _lines(recipe, units, refusals)
    first = next(lines, None)
    if first is None:
        cure = f"{refusals}name the field or column that holds it by --key, or what the files are by --as"
        raise UserError(f"no text came out of {', '.join(recipe.sources)}; {cure}")
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=chain([first], lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=recipe.vocab_size,
            byte_fallback=True,
            character_coverage=0.9999,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            num_threads=1,  # the order of threads must not decide the vocabulary
            minloglevel=2,
        )
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[-1].rpartition("] ")[2]  # after the place in the library's source
        raise UserError(f"--vocab-size {recipe.vocab_size}: no tokenizer ({reason}); use less or more text") from None
    return model.getvalue()


def _lines(recipe: Recipe, units: Sequence[Unit], refusals: Refusals) -> Iterator[str]:
    """Lines of ``tokenizer_mb`` megabytes of text: the beginning of every unit, as much of each."""
    share = recipe.tokenizer_mb * 1_000_000 // len(units)
    for unit in units:
        budget = share
        for number, document in enumerate(read_unit(unit, recipe.json_key)):
            if budget <= 0:
                break
            try:
                text = text_of(document)
            except RefusedError as error:
                if error.reason != BLANK:
                    refusals.add(error.reason, partial(unit.document_name, number, 0))
                continue
            yield from (part for line in text.split("\n") for part in _parts(line))
            budget -= len(document.content)


def _parts(line: str) -> Iterator[str]:
    """A line in pieces that sentencepiece does not skip for their length; nothing of an empty one."""
    yield from (line[start : start + _LONGEST_LINE] for start in range(0, len(line), _LONGEST_LINE))
