"""A GGUF file has the vocabulary of training, or the export is refused."""

from __future__ import annotations

import io
import json
from pathlib import Path

import gguf
import pytest
import sentencepiece

from dynmoe.data.sentencepiece_tokenizer import TOKENIZER_MODEL
from dynmoe.data.tokenizer import Tokenizer
from dynmoe.data.tokenizer_files import open_tokenizer
from dynmoe.errors import UserError
from dynmoe.hf.export import export
from dynmoe.hf.gguf import write_gguf
from dynmoe.hf.gguf_vocabulary import vocabulary
from dynmoe.hf.importing import import_checkpoint
from tests.hf.cases import begin
from tests.hf.gguf_cases import MODELS, SHAPE, read
from tests.hf.test_round_trip import SPECIAL, llama, with_tokenizer


def test_the_vocabulary_is_what_ggufs_package_reads(corpus_dir, tmp_path):
    run = begin(corpus_dir, tmp_path / "run", [*SHAPE, *MODELS["mixtral"]]).path
    out = tmp_path / "out"
    export(run, out)
    write_gguf(run, tmp_path / "model.gguf")
    fields, _ = read(tmp_path / "model.gguf")
    expected = list(gguf.SentencePieceVocab(run).all_tokens())
    keys = gguf.Keys.Tokenizer
    assert [piece.encode() for piece in fields[keys.LIST]] == [piece for piece, _, _ in expected]
    assert fields[keys.SCORES] == [score for _, score, _ in expected]
    assert fields[keys.TOKEN_TYPE] == [kind for _, _, kind in expected]
    assert {gguf.TokenType.BYTE, gguf.TokenType.CONTROL, gguf.TokenType.UNKNOWN} < set(fields[keys.TOKEN_TYPE])
    assert fields[keys.MODEL] == gguf.SentencePieceVocab.tokenizer_model
    flags = (keys.ADD_BOS, keys.ADD_EOS, keys.ADD_PREFIX, keys.REMOVE_EXTRA_WS)
    assert [fields[flag] for flag in flags] == [False] * 4
    own = open_tokenizer(run / TOKENIZER_MODEL)
    said = json.loads((out / "generation_config.json").read_text())
    ids = {keys.BOS_ID: "bos", keys.EOS_ID: "eos", keys.PAD_ID: "pad"}
    assert {key: fields[key] for key in ids} == {key: said[f"{name}_token_id"] for key, name in ids.items()}
    assert (fields[keys.EOS_ID], fields[keys.UNK_ID]) == (own.eod, own.unknown)
    assert keys.CHAT_TEMPLATE not in fields


def sentencepiece_model(folder: Path, kind: str, **settings: object) -> Tokenizer:
    """A model with the options of data_prep, except ``settings``."""
    folder.mkdir(exist_ok=True)
    content = io.BytesIO()
    lines = [f"the router of {n} takes {n * n % 7} experts" for n in range(200)]
    given = {
        "byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False,
        "add_dummy_prefix": False, "vocab_size": 300, "hard_vocab_limit": False, "minloglevel": 2,
    }  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=content, model_type=kind, **(given | settings)
    )
    (folder / TOKENIZER_MODEL).write_bytes(content.getvalue())
    return open_tokenizer(folder / TOKENIZER_MODEL)


def test_models_with_other_options_and_user_defined_pieces(tmp_path):
    """Their ids were compared with llama.cpp's own tokenizers (docs/huggingface.md)."""
    own = vocabulary(sentencepiece_model(tmp_path, "bpe", user_defined_symbols=["<tool>", "\u2581foo"]))
    kinds = dict(zip(own.pieces, own.types, strict=True))
    assert own.model == "llama"
    assert kinds["<tool>"] == kinds[" foo"] == gguf.TokenType.USER_DEFINED
    assert any(piece.startswith("\u2581") for piece in own.pieces)
    assert vocabulary(sentencepiece_model(tmp_path, "bpe", add_dummy_prefix=True)).space_before
    classic = {"byte_fallback": False, "add_dummy_prefix": True, "remove_extra_whitespaces": True}
    own = vocabulary(sentencepiece_model(tmp_path, "unigram", **classic, normalization_rule_name="nmt_nfkc"))
    assert (own.model, own.space_before, own.spaces_as_one) == ("t5", True, True)
    assert len(own.charsmap) > 1000
    assert vocabulary(sentencepiece_model(tmp_path, "unigram", byte_fallback=False)).charsmap == b""


@pytest.mark.parametrize(
    ("kind", "settings", "problem"),
    [
        ("word", {}, "whole words"),
        ("bpe", {"byte_fallback": False}, "becomes the unknown piece"),
        ("bpe", {"normalization_rule_name": "nmt_nfkc"}, r"replaces characters \(nmt_nfkc\)"),
        ("bpe", {"remove_extra_whitespaces": True}, "merges runs of spaces"),
        ("bpe", {"treat_whitespace_as_suffix": True}, "spaces as suffixes"),
        ("bpe", {"user_defined_symbols": ["<tool>"], "add_dummy_prefix": True}, "not after user-defined pieces"),
        ("bpe", {"user_defined_symbols": ["ab", "bcd"]}, "where its pieces 'ab' and 'bcd' overlap"),
        ("bpe", {"user_defined_symbols": ["a b"]}, "'a b' contains a space"),
        ("unigram", {}, "unigram model with byte fallback"),
        ("unigram", {"byte_fallback": False, "user_defined_symbols": ["<tool>"]}, "unigram .* user-defined pieces"),
        ("unigram", {"byte_fallback": False, "add_dummy_prefix": True}, "but not both"),
    ],
)
def test_tokenizers_with_other_ids_in_llama_cpp_are_refused(tmp_path, kind, settings, problem):
    with pytest.raises(UserError, match=f"^tokenizer: .*{problem}.*, which llama.cpp does not support; prepare"):
        vocabulary(sentencepiece_model(tmp_path, kind, **settings))


@pytest.mark.parametrize("begins", [True, False])
def test_the_bos_token_of_an_imported_tokenizer_is_kept(corpus_dir, tmp_path, begins):
    from transformers import AutoTokenizer

    source = tmp_path / "source"
    llama(source)
    with_tokenizer(source, corpus_dir / TOKENIZER_MODEL)
    if begins:
        path = source / "tokenizer.json"
        first = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        template = {"type": "TemplateProcessing", "single": first, "pair": first,
                    "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}}  # fmt: skip
        path.write_text(json.dumps(json.loads(path.read_text()) | {"post_processor": template}))
    theirs = AutoTokenizer.from_pretrained(source)
    assert (theirs("def main(")["input_ids"][0] == theirs.bos_token_id) == begins
    import_checkpoint(source, tmp_path / "run", [f"data.dirs=[{corpus_dir}]", "data.sequence_length=32"])
    write_gguf(tmp_path / "run", tmp_path / "model.gguf")
    fields, _ = read(tmp_path / "model.gguf")
    keys = gguf.Keys.Tokenizer
    assert (fields[keys.ADD_BOS], fields[keys.ADD_EOS]) == (begins, False)
    assert fields[keys.CHAT_TEMPLATE] == theirs.chat_template
    assert {name: fields[name] for name in (keys.BOS_ID, keys.EOS_ID, keys.EOT_ID)} == {
        keys.BOS_ID: SPECIAL["bos_token_id"], keys.EOS_ID: SPECIAL["eos_token_id"][0],
        keys.EOT_ID: SPECIAL["eos_token_id"][1],
    }  # fmt: skip
    assert fields["llama.context_length"] == 2048
