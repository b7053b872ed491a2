"""What tokens are read as: characters that sentencepiece writes as bytes are whole again."""

from __future__ import annotations

from pathlib import Path

import pytest
import sentencepiece

from dynmoe.data.tokenizer import Tokenizer
from dynmoe.data.tokenizer_files import open_tokenizer

# Of one to four bytes, of several code points, and none of them in the vocabulary.
TEXT = "A router: 神経網 ~ é 👩\u200d🔬 の\u3099 x\x00\t"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    prefix = tmp_path_factory.mktemp("bytes") / "tokenizer"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["A router of x, the router: x"] * 9), model_prefix=str(prefix), vocab_size=280,
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity", add_dummy_prefix=False,
        remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    return open_tokenizer(Path(f"{prefix}.model"))


def test_a_text_is_read_as_it_was_written(tokenizer):
    tokens = tokenizer.encode(TEXT)
    parts = list(tokenizer.written(tokens))
    assert "".join(text for text, _ in parts) == TEXT
    assert sum(length for _, length in parts) == len(tokens)
    assert {text: length for text, length in parts if not text.isascii()} == {
        character: len(character.encode()) for character in TEXT if not character.isascii()
    }
    place = 0
    for text, length in parts:  # each by itself, by sentencepiece
        assert tokenizer.decode([tokenizer.eod, *tokens[place : place + length]]).endswith(text)
        place += length


@pytest.mark.parametrize("character", ["é", "神", "🔬"])
def test_a_character_that_is_cut_is_its_bytes(tokenizer, character):
    (whole,) = tokenizer.written(tokens := tokenizer.encode(character))
    assert whole == (character, len(tokens))
    codes = [f"<0x{byte:02X}>" for byte in character.encode()]
    for cut in range(1, len(tokens)):
        for part, own in ((tokens[:cut], codes[:cut]), (tokens[cut:], codes[cut:])):
            between = [*tokenizer.encode("x"), *part, *tokenizer.encode("x神")]
            assert list(tokenizer.written(part)) == [(code, 1) for code in own]
            assert list(tokenizer.written(between)) == [("x", 1), *((code, 1) for code in own), ("x", 1), ("神", 3)]


@pytest.mark.parametrize("text", ["x", "xé神🔬", "神x", "x~"])
def test_what_may_become_a_character_waits(tokenizer, text):
    tokens = tokenizer.encode(text)
    for end in range(len(tokens) + 1):
        whole = sum(len(character.encode()) for character in text[: len(_decoded(text, end))])
        assert tokenizer.unfinished(tokens[:end]) == end - whole
    assert tokenizer.unfinished(tokens[1:]) == 0


def _decoded(text: str, bytes_: int) -> str:
    return text.encode()[:bytes_].decode(errors="ignore")
