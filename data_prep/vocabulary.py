"""Trains a tokenizer."""

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
    """Trains a BPE model with byte fallback; returns the bytes of a .model file.

    It decodes every text unchanged except for U+2581, the character that represents a space in pieces.

    Raises:
        UserError: there is too little text for the vocabulary.
    """
    model = io.BytesIO()
    refusals = Refusals()
    lines = _lines(recipe, units, refusals)
    first = next(lines, None)
    if first is None:
        cure = f"{refusals}name the field or column with the text by --key, or the format of the files by --as"
        raise UserError(f"{', '.join(recipe.sources)}: gave no text; {cure}")
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
            num_threads=1,  # the vocabulary must not depend on thread scheduling
            minloglevel=2,
        )
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[-1].rpartition("] ")[2]  # drops the position in the library's source
        raise UserError(
            f"--vocab-size {recipe.vocab_size}: training failed ({reason}); use less, or more text"
        ) from None
    return model.getvalue()


def _lines(recipe: Recipe, units: Sequence[Unit], refusals: Refusals) -> Iterator[str]:
    """Yields lines of ``tokenizer_mb`` megabytes of text, the same amount from the beginning of every unit."""
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
    """Splits a line into parts, because sentencepiece skips long lines; yields nothing if it is empty."""
    yield from (line[start : start + _LONGEST_LINE] for start in range(0, len(line), _LONGEST_LINE))
