"""Runs whose tokenizer is a tokenizer.json: export, import, GGUF files and everything that shows text."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import gguf
import pytest
from tokenizers import Tokenizer as Fast
from tokenizers import normalizers, pre_tokenizers

from data_prep.build import build
from data_prep.recipe import Recipe
from data_prep.tiktoken_files import read_tokenizer
from dynmoe.data.corpus import Corpus
from dynmoe.data.tokenizer_files import open_tokenizer
from dynmoe.errors import UserError
from dynmoe.generate import generate, stream, stream_with_experts
from dynmoe.hf import main
from dynmoe.hf.export import export
from dynmoe.hf.gguf_byte_level import byte_level_vocabulary
from dynmoe.hf.importing import import_checkpoint
from dynmoe.model.sampling import Sampling
from dynmoe.report.texts import Text
from dynmoe.report.tokens import view_tokens
from dynmoe.train.checkpoint import IMPORTED, model_files
from dynmoe.trained import open_trained
from tests.data import languages
from tests.data.languages import END, EVERYTHING, NAMED, TEXTS, save
from tests.hf.cases import OWN, begin, train_run, twenty_steps
from tests.hf.gguf_cases import MODELS, SHAPE, read
from tests.hf.test_round_trip import llama
from tests.texts import write_texts


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("texts") / "text"
    write_texts(folder, 30)
    for number, own in enumerate([*TEXTS.values(), *NAMED]):
        (folder / f"more_{number}.txt").write_text(own, newline="")
    return folder


@pytest.fixture(scope="module")
def corpora(tmp_path_factory, text) -> dict[str, Path]:
    """Corpora by kind of tokenizer."""
    folder = tmp_path_factory.mktemp("corpora")
    for name in ("olmoe", "llama3", "llama2"):
        source = save(getattr(languages, name)(), folder / "from" / name)
        build(Recipe([str(text)], tokenizer=str(source), validation_fraction=0.4), folder / name, workers=1)
    return {name: folder / name for name in ("olmoe", "llama3", "llama2")}


@pytest.mark.parametrize("name", ["olmoe", "llama3", "llama2"])
def test_an_export_gives_the_ids_of_training(corpora, tmp_path, name):
    from transformers import AutoTokenizer

    run = begin(corpora[name], tmp_path / "run", OWN["top_p"], rows=512)
    done = export(run.path, tmp_path / "out")
    assert done.texts > 0
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    own = open_tokenizer(run.path)
    for words in EVERYTHING:
        assert theirs(words)["input_ids"] == own.encode(words), "as it is called by default"
    assert theirs.eos_token_id == own.eod
    assert theirs(["a", "a b c d"], padding=True)["attention_mask"][0][0] == 0
    same = (tmp_path / "out" / "tokenizer.json").read_bytes() == own.content
    assert same == (name != "llama3"), "only a token that would be prepended is removed"
    assert not (tmp_path / "out" / "tokenizer.model").exists()


def test_an_imported_export_trains_on_the_corpus_of_the_run(corpora, tmp_path):
    """Although its tokenizer.json has lost the token that is prepended by others, and has another layout."""
    corpus = corpora["llama3"]
    export(begin(corpus, tmp_path / "run", OWN["top_p"], rows=512).path, tmp_path / "out")
    import_checkpoint(tmp_path / "out", tmp_path / "again", [*twenty_steps(corpus), "train.steps=1"])
    assert open_tokenizer(tmp_path / "again").content != open_tokenizer(corpus).content
    rows, _ = train_run(tmp_path / "again", corpus, tmp_path, 1)
    assert len(rows) == 1
    assert export(tmp_path / "again", tmp_path / "out_again").texts > 0, "compared on no text"
    own, other = (open_tokenizer(corpora[name]) for name in ("llama3", "olmoe"))
    assert not own.encodes_like(other)
    assert own.encodes_like(open_tokenizer(tmp_path / "out"))
    assert not own.encodes_like(open_tokenizer(tmp_path / "out", special_tokens=True))


def test_special_tokens_that_were_asked_for_are_exported(text, tmp_path):
    from transformers import AutoTokenizer

    source = save(languages.qwen3(), tmp_path / "qwen3")
    recipe = Recipe([str(text)], tokenizer=str(source), validation_fraction=0.4, special_tokens=True)
    build(recipe, tmp_path / "corpus", workers=1)
    run = begin(tmp_path / "corpus", tmp_path / "run", OWN["top_p"], rows=512)
    export(run.path, tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    own = open_tokenizer(run.path)
    assert theirs(f"<|im_start|>{END}")["input_ids"] == own.encode(f"<|im_start|>{END}") == [457, 456]


def test_text_is_generated_and_shown(corpora, tmp_path):
    model = open_trained(begin(corpora["olmoe"], tmp_path / "run", OWN["top_p"], rows=512).path)
    prompt = "神経 é🔬"  # é and 🔬 are not in the tokenizer's text
    steps = list(generate(model, [prompt], 12, Sampling(1.0), 0))
    tokens = model.tokenizer.encode(prompt) + [step.tokens[0] for step in steps if step.tokens[0] is not None]
    assert "".join(stream(model, prompt, iter(steps))) == model.tokenizer.decode(tokens).rstrip("\ufffd")
    shown = "".join(stream_with_experts(model, prompt, iter(steps)))
    assert "神" in shown
    assert shown.count("[") == len(tokens) - 1
    view = view_tokens(model, [Text("text", prompt)], 50)
    ids = model.tokenizer.encode(prompt)
    assert [token["id"] for token in view["tokens"]] == ids
    place = {}
    for token in view["tokens"]:
        if "character" in token:
            size = token.get("bytes", 1)
            raw = token["character"].encode()[token["byte"] : token["byte"] + size]
            assert raw == model.tokenizer.raw(token["id"])
            place[token["character"]] = token["byte"] + size
    assert place
    assert all(len(character.encode()) == end for character, end in place.items())


@pytest.mark.parametrize("name", ["olmoe", "llama3"])
def test_an_imported_checkpoint_brings_its_tokenizer(text, tmp_path, name):
    """Text is prepared with it, and the export has the files of the checkpoint."""
    from transformers import AutoTokenizer

    source = tmp_path / "source"
    llama(source, 512)
    made = save(getattr(languages, name)(), source, tokenizer_class="TokenizersBackend", chat_template="{{ messages }}",
                split_special_tokens=False)  # fmt: skip
    run = tmp_path / "run"
    import_checkpoint(source, run, [f"data.dirs=[{tmp_path / 'corpus'}]", "data.sequence_length=32"])
    own = open_tokenizer(run)
    theirs = AutoTokenizer.from_pretrained(source)
    for words in EVERYTHING:
        ids = theirs(words, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert own.encode(words) == ids
    build(Recipe([str(text)], tokenizer=str(run / "tokenizer.json"), validation_fraction=0.4), tmp_path / "corpus", 1)
    assert Corpus.open(tmp_path / "corpus").tokenizer.sha256 == own.sha256
    assert export(run, tmp_path / "out").texts > 0
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (made / file).read_bytes()
    assert model_files(run).keys() >= {"tokenizer.json", "tokenizer_config.json", f"{IMPORTED}/tokenizer.json"}


def test_a_run_that_was_imported_before_is_exported_as_before(tmp_path):
    """Earlier versions kept a tokenizer.json without making it the run's own."""
    llama(tmp_path / "source", 512)
    save(languages.olmoe(), tmp_path / "source", tokenizer_class="TokenizersBackend")
    import_checkpoint(tmp_path / "source", tmp_path / "run")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "run" / name).unlink()
    done = export(tmp_path / "run", tmp_path / "out")
    assert (done.tokenizer, done.texts) == (True, 0)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (tmp_path / "source" / "tokenizer.json").read_bytes()


def test_unusable_tokenizers_are_refused_at_import(tmp_path):
    llama(tmp_path / "source", 512)
    path = save(languages.olmoe(), tmp_path / "source") / "tokenizer.json"
    content = path.read_text()
    for changed, problem in (
        (content[:-9], "is damaged .*; move it away to import without it"),
        (content.replace(END, "<|x|>"), "has no end-of-text token; name one .* as eos_token in tokenizer_config.json"),
    ):
        path.write_text(changed)
        with pytest.raises(UserError, match=problem):
            import_checkpoint(tmp_path / "source", tmp_path / "run")
    path.write_text(content)
    shutil.rmtree(tmp_path / "source", ignore_errors=False)
    llama(tmp_path / "source", 448)
    save(languages.olmoe(), tmp_path / "source")
    with pytest.raises(UserError, match=r"vocab_size=448: .*tokenizer\.json has 460 ids; move it away"):
        import_checkpoint(tmp_path / "source", tmp_path / "run")


def test_files_of_a_run_that_are_missing_are_named(corpora, tmp_path):
    run = begin(corpora["olmoe"], tmp_path / "run", OWN["top_p"], rows=512).path
    (run / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer_config\.json is missing; copy it from the corpus"):
        open_trained(run)


def test_a_gguf_file_has_what_ggufs_package_reads(corpora, tmp_path, monkeypatch, capsys):
    run = begin(corpora["olmoe"], tmp_path / "run", [*SHAPE, *MODELS["olmoe"]], rows=512).path
    monkeypatch.setattr(sys, "argv", ["dynmoe.hf", "gguf", str(run), str(tmp_path / "model.gguf")])
    main()
    assert "Give it text in NFC" in capsys.readouterr().out
    fields, _ = read(tmp_path / "model.gguf")
    keys = gguf.Keys.Tokenizer
    expected = list(gguf.BpeVocab(run).all_tokens())
    assert [piece.encode() for piece in fields[keys.LIST]] == [_raw(piece) for piece, _, _ in expected]
    assert (fields[keys.MODEL], fields[keys.PRE]) == ("gpt2", "gpt-2")
    assert fields[keys.MERGES] == gguf.SpecialVocab(run, load_merges=True).merges
    kinds = dict(zip(fields[keys.LIST], fields[keys.TOKEN_TYPE], strict=True))
    assert (kinds[END], kinds["<|tool|>"], kinds["a"]) == (
        gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED, gguf.TokenType.NORMAL,
    )  # fmt: skip
    assert fields[keys.EOS_ID] == fields[keys.BOS_ID] == open_tokenizer(run).eod
    assert fields[keys.ADD_BOS] is False
    assert keys.SCORES not in fields


def _raw(piece: str | bytes) -> bytes:
    return piece.encode() if isinstance(piece, str) else piece


def split(pattern: str):
    return lambda made: setattr(made, "pre_tokenizer", languages._byte_level(pattern).pre_tokenizer)


def named(made: Fast, folder: Path) -> str:
    return byte_level_vocabulary(open_tokenizer(save(made, folder))).words


def test_names_of_splits_in_llama_cpp(tmp_path):
    expected = {"olmoe": "gpt-2", "qwen3": "qwen2", "llama3": "llama-bpe", "dbrx": "dbrx", "smollm": "smollm"}
    assert {name: named(getattr(languages, name)(), tmp_path / name) for name in expected} == expected


@pytest.mark.parametrize(("change", "problem"), [
    (split(r"\p{L}+|\P{L}"), "it splits text into words by rules of its own"),
    (lambda made: setattr(made, "pre_tokenizer", pre_tokenizers.ByteLevel()),
     "it splits text into words by rules of its own"),
    (lambda made: setattr(made, "normalizer", normalizers.NFKC()), r"it changes the text \(normalizer\)"),
    (lambda made: made.add_tokens(["ab", "bcd"]), "where its added tokens 'ab' and 'bcd' overlap.*"),
], ids=["pattern", "space", "normalizer", "overlap"])  # fmt: skip
def test_tokenizers_with_other_ids_in_llama_cpp_are_refused(tmp_path, change, problem):
    made = languages.olmoe()
    change(made)
    with pytest.raises(UserError, match=f"^tokenizer: {problem}, which llama.cpp does not support; serve"):
        named(made, tmp_path)


def test_other_kinds_are_refused_for_llama_cpp(tmp_path):
    with pytest.raises(UserError, match=r"not a byte-level byte-pair encoding, which llama\.cpp"):
        named(languages.llama2(), tmp_path)


def test_words_that_are_not_merged_are_refused_for_llama_cpp(tmp_path):
    """llama.cpp looks for whole words with the pattern of Llama 3 only."""
    tokens = [*(bytes([byte]) for byte in range(256)), b"ab", b"abc"]
    for pieces, fine in ((tokens, True), ([*tokens, b"wxyz"], False)):
        path = languages.save_ranks({token: rank for rank, token in enumerate(pieces)}, tmp_path / "own.tiktoken")
        own = read_tokenizer(str(path), pattern="gpt2")
        if fine:
            assert byte_level_vocabulary(own).words == "gpt-2"
            assert json.loads(own.content)["model"]["ignore_merges"]
            continue
        with pytest.raises(UserError, match=r"token 'wxyz' is only found as a whole word \(ignore_merges\)"):
            byte_level_vocabulary(own)
