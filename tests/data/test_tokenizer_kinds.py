"""Tokenizers of Hugging Face's library give its own ids, and special tokens in a text stay text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Fast
from tokenizers import decoders, models, pre_tokenizers

from data_prep.adopt import adopt
from data_prep.build import build, is_current
from data_prep.recipe import Recipe
from data_prep.tiktoken_files import read_tokenizer
from dynmoe.data.corpus import Corpus, open_corpora
from dynmoe.data.tokenizer_files import find_tokenizer, open_tokenizer
from dynmoe.errors import UserError
from tests.data import languages
from tests.data.languages import BEGIN, END, EVERYTHING, NAMED, ODD, TEXTS, save
from tests.texts import write_texts

KINDS = ["olmoe", "qwen3", "llama3", "llama2"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Directories of tokenizers by kind, as the hub has them."""
    folder = tmp_path_factory.mktemp("tokenizers")
    return {name: save(getattr(languages, name)(), folder / name) for name in (*KINDS, "unigram")}


@pytest.mark.parametrize("name", KINDS)
def test_ids_are_the_librarys_own(folders, name):
    theirs = Fast.from_file(str(folders[name] / "tokenizer.json"))
    ours = open_tokenizer(folders[name])
    for text in (*TEXTS.values(), *ODD):
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids
    assert ours.vocab_size == 1 + max(theirs.get_vocab().values())


@pytest.mark.parametrize("name", KINDS)
def test_texts_are_decoded_whole_and_in_parts(folders, name):
    """Each part by itself gives its characters; only normalization and the leading space of Llama 2 change a text."""
    own = open_tokenizer(folders[name])
    theirs = Fast.from_file(str(folders[name] / "tokenizer.json"))
    for text in EVERYTHING:
        tokens = own.encode(text)
        normal = text if theirs.normalizer is None or name == "llama2" else theirs.normalizer.normalize_str(text)
        assert own.decode(tokens) == theirs.decode(tokens, skip_special_tokens=False) == normal
        space = " " if name == "llama2" and text else ""
        assert "".join(part for part, _ in own.written(tokens)) == space + normal
        assert sum(length for _, length in own.written(tokens)) == len(tokens)
        for end in range(len(tokens) + 1):
            waiting = own.unfinished(tokens[:end])
            whole = b"".join(own.raw(token) for token in tokens[: end - waiting])
            assert (space + normal).startswith(whole.decode()), "a character was cut"
            assert waiting == 0 or waiting <= 4


def test_bytes_of_a_character_that_is_cut_are_shown(tmp_path):
    """Tokens that end and begin within characters: " 神" is a space and one byte, then two bytes."""
    made = Fast(models.BPE({"Ġç": 0, "¥ŀ": 1, "Ġ": 2, "x": 3, "é": 4, END: 5}, []))
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([END])
    own = open_tokenizer(save(made, tmp_path))
    assert [own.raw(token) for token in range(5)] == [b" \xe7", b"\xa5\x9e", b" ", b"x", b"\xe9"]
    assert list(own.written([3, 0, 1, 3])) == [("x", 1), (" 神", 2), ("x", 1)]
    assert list(own.written([0, 3, 1, 4])) == [(" <0xE7>", 1), ("x", 1), ("<0xA5><0x9E>", 1), ("<0xE9>", 1)]
    assert [own.unfinished(tokens) for tokens in ([3, 0], [0, 1], [0, 3], [1], [3, 4])] == [1, 0, 0, 0, 1]
    assert (own.piece(0), own.piece(5), own.piece(99)) == (" <0xE7>", END, "<token 99>")


def test_added_tokens_are_read_as_text(tmp_path):
    """The library reads éø as the bytes that the byte-level alphabet writes so."""
    made = languages.olmoe()
    made.add_tokens(["éø", "日"])
    own = open_tokenizer(save(made, tmp_path))
    tokens = own.encode("aéø日")
    assert tokens[1:] == [own.vocab_size - 2, own.vocab_size - 1]
    assert made.decode(tokens) != own.decode(tokens) == "aéø日"


@pytest.mark.parametrize("name", KINDS)
def test_special_tokens_in_a_text_stay_text(folders, name):
    own = open_tokenizer(folders[name])
    special = {token for token, (_, is_special) in own.added.items() if is_special and token != own.unknown}
    assert own.eod in special
    names = [own.added[token][0] for token in special]
    for text in [*NAMED, *names, *(f"a {name}{name} b" for name in names)]:
        tokens = own.encode(text)
        assert not special & set(tokens)
        assert own.decode(tokens) == text


def test_special_tokens_in_a_text_become_ids_if_asked_for(folders):
    own = open_tokenizer(folders["qwen3"], special_tokens=True)
    theirs = Fast.from_file(str(folders["qwen3"] / "tokenizer.json"))
    for text in EVERYTHING:
        assert own.encode(text) == theirs.encode(text, add_special_tokens=False).ids
    assert own.encode(f"<|im_start|>a{END}").count(own.eod) == 1
    assert own.sha256 != open_tokenizer(folders["qwen3"]).sha256


def test_only_a_corpus_or_a_run_decides_about_special_tokens_by_its_files(folders, tmp_path):
    """Files of public models say what their library does with a prompt."""
    public = save(languages.qwen3(), tmp_path / "public", eos_token=END, split_special_tokens=False)
    assert read_tokenizer(str(public)).eod not in read_tokenizer(str(public)).encode(f"a{END}b")
    write_texts(tmp_path / "text", documents=8)
    for wanted in (True, None):
        recipe = Recipe([str(tmp_path / "text")], tokenizer=str(public), validation_fraction=0.4, special_tokens=wanted)
        build(recipe, tmp_path / f"corpus_{wanted}", workers=1)
        again = read_tokenizer(str(tmp_path / f"corpus_{wanted}"))
        assert again.sha256 == read_tokenizer(str(public), special_tokens=wanted).sha256
        assert (again.eod in again.encode(f"a{END}b")) == bool(wanted)


def test_a_model_that_reads_special_tokens_itself_is_refused(folders, tmp_path):
    """A unigram model has them in its own vocabulary, where the library does not see them."""
    with pytest.raises(UserError, match=r"encodes the text '</s>' as the special token .*--special-tokens"):
        open_tokenizer(folders["unigram"])
    own = open_tokenizer(folders["unigram"], special_tokens=True)
    assert own.eod in own.encode("a </s> b")
    made = languages.olmoe()
    made.add_tokens(["<eot>"])  # not special
    with pytest.raises(UserError, match="encodes the text '<eot>' as the special token"):
        open_tokenizer(save(made, tmp_path, eos_token="<eot>"))


def test_nothing_is_added_and_nothing_is_cut_off(tmp_path):
    made = languages.llama3()
    text = TEXTS["code"]
    expected = made.encode(text, add_special_tokens=False).ids
    assert made.encode(text).ids[0] == made.token_to_id(BEGIN)
    made.enable_truncation(8)
    made.enable_padding(length=500)
    assert open_tokenizer(save(made, tmp_path)).encode(text) == expected


@pytest.mark.parametrize(("config", "end"), [
    ({}, END),  # the only one that is well known
    ({"eos_token": "<|im_end|>"}, "<|im_end|>"),
    ({"eos_token": {"content": "<|im_end|>", "lstrip": False}}, "<|im_end|>"),
    ({"eos_token": None}, END),
])  # fmt: skip
def test_the_directory_says_which_token_ends_a_text(tmp_path, config, end):
    made = languages.qwen3()
    own = open_tokenizer(save(made, tmp_path, **config))
    assert own.eod == made.token_to_id(end)
    assert open_tokenizer(tmp_path, end_of_text="<|im_start|>").eod == made.token_to_id("<|im_start|>")
    (tmp_path / "tokenizer_config.json").unlink(missing_ok=True)
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(config))
    assert open_tokenizer(tmp_path / "tokenizer.json").eod == own.eod


def refused(path: Path, problem: str, **options) -> None:
    with pytest.raises(UserError, match=problem) as error:
        read_tokenizer(str(path), **options)
    assert "\n" not in str(error.value)


def test_files_that_cannot_be_used(folders, tmp_path):
    made = languages.olmoe()
    path = save(made, tmp_path) / "tokenizer.json"
    content = path.read_text()
    refused(path, "has no token '<|x|>', which is to end each text; name one of its tokens", end_of_text="<|x|>")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|y|>"}')
    refused(path, r"has no token '<\|y\|>'")
    for config, problem in (("[]", "is not a JSON object; repair"), ("{", "cannot be read .*; repair or remove it")):
        (tmp_path / "tokenizer_config.json").write_text(config)
        refused(path, f"tokenizer_config.json {problem}")
    (tmp_path / "tokenizer_config.json").unlink()
    path.write_text(content.replace(END, "<|other|>"))
    refused(path, "has no end-of-text token; name one with data_prep --end-of-text TOKEN, or as eos_token in")
    made.add_special_tokens(["</s>"])
    made.save(str(path))
    refused(path, r"several tokens that may end a text \(<\|endoftext\|>, </s>\); name one")
    path.write_text(content.replace('"dropout": null', '"dropout": 0.1'))
    refused(path, "model.dropout makes its ids random; set it to null")
    for damaged in (content[:-50], '{"a": 1}', content.replace('"BPE"', '"Foo"')):
        path.write_text(damaged)
        refused(path, "is damaged or not of the library tokenizers .*; use a sentencepiece model, a tokenizer.json or")
    path.unlink()
    refused(tmp_path, "has no tokenizer.model and no tokenizer.json; use")
    refused(folders["olmoe"], "--tiktoken-pattern 'gpt2': .* is not a tiktoken file", pattern="gpt2")


def test_a_text_that_cannot_be_encoded_is_refused(tmp_path):
    made = Fast(models.WordLevel({"a": 0, END: 1}, unk_token="<unk>"))
    own = open_tokenizer(save(made, tmp_path), special_tokens=True)
    assert own.encode("a") == [0]
    with pytest.raises(UserError, match=r"json cannot encode a text \(.*\); use one with bytes or an unknown"):
        own.encode("b")


def test_options_for_other_tokenizers_are_refused(corpus_dir, tmp_path):
    refused(corpus_dir, "--end-of-text '<x>': applies to tokenizer.json and tiktoken files", end_of_text="<x>")
    refused(corpus_dir, "--special-tokens: applies to tokenizer.json and tiktoken files", special_tokens=True)
    with pytest.raises(UserError, match="--end-of-text: applies to a given tokenizer; pass --tokenizer too"):
        Recipe(["text"], end_of_text="<x>")


def test_which_of_two_files_is_used(folders, corpus_dir, tmp_path):
    """Exports have both; Llama 3 calls a tiktoken file tokenizer.model."""
    assert find_tokenizer(tmp_path) is None
    (tmp_path / "tokenizer.json").write_bytes((folders["olmoe"] / "tokenizer.json").read_bytes())
    assert find_tokenizer(tmp_path) == tmp_path / "tokenizer.json"
    model = tmp_path / "tokenizer.model"
    model.write_bytes((corpus_dir / "tokenizer.model").read_bytes())
    assert find_tokenizer(tmp_path) == model
    model.write_bytes(b"IQ== 0\nIg== 1\n")
    assert find_tokenizer(tmp_path) == tmp_path / "tokenizer.json"
    assert open_tokenizer(tmp_path).sha256 == open_tokenizer(folders["olmoe"]).sha256


def recipe_of(source: Path, **options) -> Recipe:
    return Recipe([str(source)], validation_fraction=0.3, **options)


def prepare(source: Path, out: Path, **options) -> Corpus:
    build(recipe_of(source, **options), out, workers=1)
    return Corpus.open(out)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Documents of which some contain the names of special tokens."""
    folder = tmp_path_factory.mktemp("source")
    write_texts(folder / "text", 20)
    for number, text in enumerate([*TEXTS.values(), *NAMED]):
        (folder / "text" / f"more_{number}.txt").write_text(text, newline="")
    return folder / "text"


def test_a_corpus_has_the_librarys_ids(folders, source, tmp_path):
    corpus = prepare(source, tmp_path / "out", tokenizer=str(folders["qwen3"]))
    theirs = Fast.from_file(str(folders["qwen3"] / "tokenizer.json"))
    theirs.encode_special_tokens = True
    end = theirs.token_to_id(END)
    expected = sorted(
        [*theirs.encode(path.read_bytes().decode(), add_special_tokens=False).ids, end] for path in source.iterdir()
    )
    found = [list(tokens) for split in corpus.splits.values() for tokens in split.documents()]
    assert sorted(found) == expected
    corpus.verify()
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (folders["qwen3"] / "tokenizer.json").read_bytes()
    assert corpus.manifest["files"].keys() >= {"tokenizer.json", "tokenizer_config.json"}
    assert not (tmp_path / "out" / "tokenizer.model").exists()


def test_decisions_are_kept_with_the_corpus(folders, source, tmp_path):
    options = {"tokenizer": str(folders["qwen3"]), "end_of_text": "<|im_end|>", "special_tokens": True}
    first = prepare(source, tmp_path / "first", **options)
    assert is_current(recipe_of(source, **options), first.path)
    for name in ("end_of_text", "special_tokens"):
        assert not is_current(recipe_of(source, **options | {name: None}), first.path), name
    theirs = Fast.from_file(str(folders["qwen3"] / "tokenizer.json"))
    assert first.tokenizer.eod == theirs.token_to_id("<|im_end|>")
    inside = theirs.token_to_id(END)
    assert any(inside in tokens for split in first.splits.values() for tokens in split.documents())
    second = prepare(source, tmp_path / "second", tokenizer=str(tmp_path / "first"))
    assert second.tokenizer.sha256 == first.tokenizer.sha256
    assert [corpus.path for corpus in open_corpora([str(first.path), str(second.path)], 8)] == [first.path, second.path]
    other = prepare(source, tmp_path / "other", tokenizer=str(folders["qwen3"]))
    with pytest.raises(UserError, match=r"different tokenizer .*--tokenizer .*first/tokenizer\.json"):
        open_corpora([str(first.path), str(other.path)], 8)
    (tmp_path / "first" / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match=r"is not the tokenizer of the manifest|tokenizer_config\.json is missing"):
        Corpus.open(tmp_path / "first")


def test_ids_beyond_16_bits(source, tmp_path):
    pieces = {piece: number for number, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Fast(models.BPE(pieces | {f"<{number}>": number for number in range(256, 70_000)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([END])
    corpus = prepare(source, tmp_path / "out", tokenizer=str(save(made, tmp_path / "large")))
    assert corpus.tokenizer.vocab_size == corpus.tokenizer.eod + 1 == 70_001
    for split in corpus.splits.values():
        assert split.dtype == "<i4"
        assert all(tokens[-1] == 70_000 for tokens in split.documents())
    corpus.verify()


def test_tokens_of_megatrons_own_tool_are_adopted(folders, source, tmp_path):
    made = prepare(source, tmp_path / "made", tokenizer=str(folders["llama3"]))
    adopt(made.path / "train", made.path / "validation", 0.0, made.tokenizer, tmp_path / "out")
    adopted = Corpus.open(tmp_path / "out")
    assert adopted.tokenizer.sha256 == made.tokenizer.sha256
    assert (adopted.path / "train.bin").read_bytes() == (made.path / "train.bin").read_bytes()
