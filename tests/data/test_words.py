"""Texts that are encoded word by word, from a cache, have the ids of the library."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers, pre_tokenizers

from data_prep.encode import WordEncoder
from data_prep.tiktoken_files import PATTERNS, read_tokenizer
from dynmoe.data.tokenizer import Tokenizer
from dynmoe.data.tokenizer_files import open_tokenizer
from tests.data import languages
from tests.data.languages import END, EVERYTHING, TEXTS, every_part, save, save_ranks

KINDS = ["qwen3", "llama3", "dbrx", "smollm", "gpt2"]
# What words end at, and what could join across.
PIECES = [
    *"ab1 \n\t.,'/<=|\u0338\u0301\u00a0\u2003\x1c\r5Z_", "  ", "don't", "'s", "'LL", "\n\n  ", "<|", "|>", "im_start",
    "日", "é", "\u212a", "\u037e", "\ud7ff", "٣", "<think>", "think", END,
]  # fmt: skip


@pytest.fixture(scope="module")
def encoders(tmp_path_factory) -> dict[str, Tokenizer]:
    """Tokenizers with every part of the texts as a token, by pattern, and those of public models."""
    folder = tmp_path_factory.mktemp("words")
    path = save_ranks(every_part([*EVERYTHING, "".join(PIECES)]), folder / "own.tiktoken")
    made = {name: read_tokenizer(str(path), pattern=name) for name in PATTERNS}
    return made | {f"{name} (model)": open_tokenizer(save(getattr(languages, name)(), folder / name)) for name in KINDS}


@pytest.mark.parametrize("name", [*PATTERNS, *(f"{name} (model)" for name in KINDS)])
def test_ids_are_those_of_whole_texts(encoders, name):
    own = encoders[name]
    assert own.splits_into_words
    words = WordEncoder(own)
    draw = random.Random(1)
    characters = "".join(EVERYTHING)
    mixed = ["".join(draw.choices(PIECES, k=30)) for _ in range(2000)]
    mixed += ["".join(draw.choices(characters, k=60)) for _ in range(500)]
    for text in [*EVERYTHING, *mixed]:
        assert words.encode(text).tolist() == own.encode(text), repr(text)
    assert len(own.words(TEXTS["English"])) > 20


@given(data=st.data())
def test_ids_of_any_text(encoders, data):
    own = encoders[data.draw(st.sampled_from(sorted(encoders)))]
    text = "".join(data.draw(st.lists(st.sampled_from(PIECES) | st.characters(codec="utf-8"), max_size=30)))
    assert WordEncoder(own).encode(text).tolist() == own.encode(text)


def test_a_text_with_a_token_across_words_is_left_whole(tmp_path):
    made = languages.qwen3()
    made.add_tokens([AddedToken("<think>", normalized=False), AddedToken("im", normalized=False)])
    own = open_tokenizer(save(made, tmp_path))
    assert own.splits_into_words
    assert len(own.words("a b")) == 2
    for text in ("a <think> b", "a <|im_start|> b"):  # the special token stays text, and hides the other one
        assert own.words(text) == [text]
        assert WordEncoder(own).encode(text).tolist() == own.encode(text)
    assert own.vocab_size - 1 not in own.encode("<|im_start|>")
    assert own.vocab_size - 1 in own.encode("<|im_ start|>")


@pytest.mark.parametrize("change", [
    lambda made: made.add_tokens([AddedToken("x", rstrip=True)]),
    lambda made: made.add_tokens([AddedToken("a b")]),  # found in normalized text
    lambda made: setattr(made, "normalizer", normalizers.NFKC()),
    lambda made: setattr(made, "pre_tokenizer", pre_tokenizers.ByteLevel()),  # adds a space
    lambda made: setattr(made, "pre_tokenizer", languages._byte_level(r"\S+\s+|\s").pre_tokenizer),
])  # fmt: skip
def test_other_tokenizers_take_whole_texts(tmp_path, change):
    made = languages.qwen3()
    change(made)
    own = open_tokenizer(save(made, tmp_path))
    assert not own.splits_into_words
    assert WordEncoder(own).encode(TEXTS["code"]).tolist() == own.encode(TEXTS["code"])
