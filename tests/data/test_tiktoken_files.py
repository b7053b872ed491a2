"""A converted tiktoken file gives tiktoken's own ids."""

from __future__ import annotations

import hashlib
import random

import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st
from tiktoken_ext import openai_public

from data_prep.tiktoken_files import ENCODINGS, PATTERNS, read_tokenizer
from dynmoe.errors import UserError
from tests.data.languages import END, EVERYTHING, LLAMA, QWEN, TEXTS, every_part, save_ranks

# The library's own definitions, by our name of the pattern.
OWN = {"gpt2": "r50k_base", "cl100k": "cl100k_base", "o200k": "o200k_base"}


@pytest.fixture(scope="module")
def definitions():
    """Hashes, patterns and special tokens of the library's encodings, without their files."""
    hashes: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openai_public, "load_tiktoken_bpe", lambda url, expected_hash: hashes.append(expected_hash))
        names = ["r50k_base", "p50k_base", "cl100k_base", "o200k_base"]
        found = {name: openai_public.ENCODING_CONSTRUCTORS[name]() for name in names}
    return {name: (own, sha256) for (name, own), sha256 in zip(found.items(), hashes, strict=True)}


@pytest.fixture(scope="module")
def ranks() -> dict[bytes, int]:
    """Every part of the texts that has up to five bytes is a token, so that each way to split them gives other ids."""
    return every_part(EVERYTHING)


def tiktokens(pattern: str, ranks: dict[bytes, int]) -> tiktoken.Encoding:
    return tiktoken.Encoding("own", pat_str=pattern, mergeable_ranks=ranks, special_tokens={END: len(ranks)})


@pytest.mark.parametrize("name", PATTERNS)
def test_ids_are_tiktokens_own(definitions, ranks, tmp_path, name):
    pattern = definitions[OWN[name]][0]["pat_str"] if name in OWN else {"llama3": LLAMA, "qwen": QWEN}[name]
    theirs = tiktokens(pattern, ranks)
    ours = read_tokenizer(str(save_ranks(ranks, tmp_path / "own.tiktoken")), pattern=name)
    assert ours.eod == len(ranks)
    assert len({*theirs.encode_ordinary(TEXTS["English"])}) > 20
    draw = random.Random(0)
    characters = "".join(EVERYTHING)
    mixed = ["".join(draw.choices(characters, k=40)) for _ in range(300)]
    for text in [*EVERYTHING, *mixed]:
        ids = theirs.encode_ordinary(text)
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids) == text


def test_patterns_split_differently(ranks, tmp_path):
    """Else the tests above would pass with any of them."""
    path = str(save_ranks(ranks, tmp_path / "own.tiktoken"))
    made = {name: read_tokenizer(path, pattern=name) for name in PATTERNS}
    found = {name: [own.encode(text) for text in EVERYTHING] for name, own in made.items()}
    names = list(PATTERNS)
    assert all(found[a] != found[b] for a in names for b in names if a < b)


@given(data=st.data())
def test_merges_are_those_of_any_ranks(tmp_path_factory, data):
    """Ranks in no order that training would give, with tokens that overlap and tokens that are never merged."""
    words = st.text("ab c", min_size=2, max_size=6).map(str.encode)
    tokens = data.draw(st.lists(words, unique=True, max_size=25))
    ranks = {bytes([byte]): byte for byte in range(256)} | {token: 256 + n for n, token in enumerate(tokens)}
    theirs = tiktokens(PATTERNS["gpt2"].replace(r"\z", "$"), ranks)
    path = save_ranks(ranks, tmp_path_factory.mktemp("ranks") / "own.tiktoken")
    ours = read_tokenizer(str(path), pattern="gpt2")
    for text in data.draw(st.lists(st.text("ab c", max_size=30), min_size=5, max_size=20)):
        assert ours.encode(text) == theirs.encode_ordinary(text)


def test_public_files_are_known_by_their_hash(definitions):
    for name in ("r50k_base", "p50k_base", "cl100k_base", "o200k_base"):
        own, sha256 = definitions[name]
        assert ENCODINGS[sha256].special == own["special_tokens"]
        assert definitions[OWN[ENCODINGS[sha256].pattern]][0]["pat_str"] == own["pat_str"]
    (llama,) = (known.special for known in ENCODINGS.values() if known.pattern == "llama3")
    assert sorted(llama.values()) == [*range(128_000, 128_256)]
    assert [llama[f"<|{name}|>"] for name in ("begin_of_text", "end_of_text", "eot_id")] == [128_000, 128_001, 128_009]


def test_a_known_file_needs_no_options(ranks, tmp_path, monkeypatch):
    path = save_ranks(ranks, tmp_path / "tokenizer.model")
    known = ENCODINGS["82e9d31979e92ab929cd544440f129d9ecd797b69e327f80f17e1c50d5551b55"]
    monkeypatch.setitem(ENCODINGS, hashlib.sha256(path.read_bytes()).hexdigest(), known)
    for place in (path, tmp_path):  # the file and its directory
        own = read_tokenizer(str(place))
        assert (own.eod, own.vocab_size) == (128_001, 128_256)
        assert own.encode(TEXTS["English"]) == tiktokens(LLAMA, ranks).encode_ordinary(TEXTS["English"])
    assert read_tokenizer(str(path), end_of_text="<|eot_id|>").eod == 128_009


def test_special_tokens_come_from_the_directory(ranks, tmp_path):
    save_ranks(ranks, tmp_path / "qwen.tiktoken")
    listed = '{"200000": {"content": "<|im_end|>"}, "200001": {"content": "<|endoftext|>"}}'
    config = tmp_path / "tokenizer_config.json"
    config.write_text(f'{{"eos_token": "<|im_end|>", "added_tokens_decoder": {listed}}}')
    own = read_tokenizer(str(tmp_path), pattern="qwen")
    assert (own.eod, own.vocab_size) == (200_000, 200_002)
    assert read_tokenizer(str(tmp_path), END, pattern="qwen").eod == 200_001
    assert 200_000 not in own.encode("a<|im_end|>")
    config.write_text(f'{{"split_special_tokens": false, "added_tokens_decoder": {listed}, "eos_token": "<|im_end|>"}}')
    assert 200_000 not in read_tokenizer(str(tmp_path), pattern="qwen").encode("a<|im_end|>")
    own = read_tokenizer(str(tmp_path), special_tokens=True, pattern="qwen")
    assert own.encode("a<|im_end|>")[-1] == 200_000
    config.write_text('{"added_tokens_decoder": [1]}')
    refused(tmp_path, "does not list tokens by id; repair or remove", pattern="qwen")


def test_a_regular_expression_may_split(ranks, tmp_path):
    path = save_ranks(ranks, tmp_path / "own.tiktoken")
    for pattern in (r"\w+|\W", r"\p{L}+|\p{N}{1,3}|[^\p{L}\p{N}]", r"[\w$]+|[^\w$^]|\^", r"[\]$]|\$?\w+|[^\]\w$]"):
        own = read_tokenizer(str(path), "<|stop|>", pattern=pattern)
        assert own.eod == len(ranks)
        text = TEXTS["German"] + " a$b^2 [$]"
        assert own.encode(text) == tiktokens(pattern, ranks).encode_ordinary(text), pattern


def refused(path, problem: str, **options) -> None:
    with pytest.raises(UserError, match=problem) as error:
        read_tokenizer(str(path), **options)
    assert "\n" not in str(error.value)


def test_files_and_patterns_that_cannot_be_used(ranks, tmp_path):
    path = save_ranks(ranks, tmp_path / "own.tiktoken")
    refused(path, r"pattern by which it splits text is not known; pass --tiktoken-pattern gpt2\|cl100k\|")
    for pattern, problem in (
        (r"\p{N}{1,3}+|\D", r"reads this differently: .*\(\?>X\{1,3\}\)"),
        (r"\s+$|.", r"write \\z"),
        ("a|(?i)b", "write \\(\\?i:X\\)"),
        ("cl100k_base", "no such pattern; use gpt2, .*, or a regular expression"),
        ("(", r"is neither gpt2, .* nor a regular expression \(.*\); correct it"),
    ):
        refused(path, problem, pattern=pattern)
    content = path.read_bytes()
    for damaged, problem in (
        (content[:600], "line .* is not a token in base64|lacks .* of the 256 bytes"),
        (content.replace(b" 300\n", b" x\n"), "line 301 is not a token in base64"),
        (content.replace(b" 300\n", b" 299\n"), "two tokens of one rank"),
        (content[7:], "lacks 1 of the 256 bytes; copy"),
    ):
        path.write_bytes(damaged)
        refused(path, problem, pattern="gpt2")
    (tmp_path / "foreign").write_bytes(b"\x00\x01")
    refused(tmp_path / "foreign", "is not a tiktoken file; remove the option", pattern="gpt2")
    refused(tmp_path / "foreign", "is not a sentencepiece model; use a sentencepiece model, a tokenizer.json or")
    refused(tmp_path / "nothing", "cannot be read: No such file")
