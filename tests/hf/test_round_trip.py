"""Files of an imported checkpoint are exported again; an unusable tokenizer is refused at import."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dynmoe.config import load_config
from dynmoe.data.sentencepiece_tokenizer import TOKENIZER_MODEL
from dynmoe.data.tokenizer_files import open_tokenizer
from dynmoe.errors import UserError
from dynmoe.hf.export import export, own_fields
from dynmoe.hf.importing import import_checkpoint
from dynmoe.hf.kept import Kept
from dynmoe.hf.tokenizer import compare
from dynmoe.train.checkpoint import IMPORTED, model_files
from dynmoe.trained import open_decoder, open_trained
from tests.hf.cases import some_tokens
from tests.hf.test_import import GOLDEN, RELEASES

SPECIAL = {"bos_token_id": 1, "eos_token_id": [2, 7], "pad_token_id": 5}


@pytest.mark.parametrize("name", RELEASES[1:])
def test_the_papers_release_is_exported_with_its_own_logits(name, tmp_path):
    from transformers import AutoModelForCausalLM

    import_checkpoint(GOLDEN / name, tmp_path / "run")
    done = export(tmp_path / "run", tmp_path / "out")
    assert (done.architecture, done.tokenizer, done.texts) == ("dynmoe", False, 0)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    expected = load_file(GOLDEN / name / "expected.safetensors")
    with torch.no_grad():
        found = model(expected["input_ids"], output_router_logits=True)
    torch.testing.assert_close(found.logits, expected["logits"], rtol=0, atol=1e-4)
    assert torch.equal(found.experts_per_token, expected["experts_per_token"])
    config = model.config
    assert (config.max_position_embeddings, config.bos_token_id, config.eos_token_id) == (64, 1, 2)
    generation = "generation_config.json"
    assert (tmp_path / "out" / generation).read_bytes() == (GOLDEN / name / generation).read_bytes()


def llama(folder: Path, vocab_size: int = 448, **settings):
    """Saves a transformers checkpoint with 2,048 positions."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocab_size, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        initializer_range=0.3, **({"max_position_embeddings": 2048} | SPECIAL | settings),
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    model.generation_config.temperature = 0.7
    model.generation_config.do_sample = True
    model.save_pretrained(folder)
    return model


def with_tokenizer(folder: Path, tokenizer_model: Path) -> None:
    """Saves the tokenizer that transformers creates from a sentencepiece model."""
    from transformers import AutoTokenizer

    shutil.copy(tokenizer_model, folder)
    fast = AutoTokenizer.from_pretrained(folder, use_fast=True)
    fast.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    fast.save_pretrained(folder)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in ("config.json", "README.md")}


def test_tokenizer_positions_and_special_tokens_are_exported_unchanged(corpus_dir, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = tmp_path / "source"
    out = tmp_path / "out"
    model = llama(source)
    with_tokenizer(source, corpus_dir / TOKENIZER_MODEL)
    import_checkpoint(source, tmp_path / "run", [f"data.dirs=[{corpus_dir}]", "data.sequence_length=32"])
    done = export(tmp_path / "run", out)
    assert done.texts > 0, "not compared with sentencepiece"
    there, here = map(files_of, (source, out))
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", TOKENIZER_MODEL} < there.keys()
    del there["model.safetensors"], here["model.safetensors"]
    assert here == there
    again = AutoModelForCausalLM.from_pretrained(out)
    for name, value in (SPECIAL | {"max_position_embeddings": 2048}).items():
        assert getattr(again.config, name) == value, name
    assert again.generation_config.temperature == 0.7
    with torch.no_grad():
        torch.testing.assert_close(again(some_tokens()).logits, model(some_tokens()).logits, rtol=0, atol=1e-5)
    first, second = map(AutoTokenizer.from_pretrained, (source, out))
    assert first("def main(") == second("def main(")
    assert second.apply_chat_template([{"role": "user", "content": "def"}], tokenize=False) == "def"


def test_an_imported_tokenizer_with_other_ids_than_training_is_refused(corpus_dir, tmp_path):
    llama(tmp_path / "source")
    with_tokenizer(tmp_path / "source", corpus_dir / TOKENIZER_MODEL)
    path = tmp_path / "source" / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"normalizer": {"type": "Lowercase"}}))
    import_checkpoint(tmp_path / "source", tmp_path / "run", [f"data.dirs=[{corpus_dir}]"])
    words = r"ids differ between transformers and sentencepiece .*; remove tokenizer\.json .*run/imported"
    with pytest.raises(UserError, match=words):
        export(tmp_path / "run", tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "run" / IMPORTED / name).unlink()
    assert export(tmp_path / "run", tmp_path / "out").texts > 0


def test_special_tokens_in_a_text_are_not_compared(corpus_dir, tmp_path):
    """The imported tokenizer reads ``</s>`` as a token; training treats it as text."""
    from transformers import AutoTokenizer

    llama(tmp_path / "source")
    with_tokenizer(tmp_path / "source", corpus_dir / TOKENIZER_MODEL)
    own = open_tokenizer(corpus_dir / TOKENIZER_MODEL)
    text = "a </s> b"
    theirs = AutoTokenizer.from_pretrained(tmp_path / "source")
    assert theirs(text, add_special_tokens=False)["input_ids"] != own.encode(text)
    assert compare(own, tmp_path / "source", [text], "") == 1


def test_a_tokenizer_that_is_not_sentencepieces_is_exported_unchanged(tmp_path):
    from tokenizers import Tokenizer as Fast
    from tokenizers import models
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    llama(tmp_path / "source", 96)
    pieces = {"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4, "ab": 5}
    fast = Fast(models.BPE(pieces, [("a", "b")], unk_token="<unk>"))
    wrapped = PreTrainedTokenizerFast(tokenizer_object=fast, bos_token="<s>", eos_token="</s>")
    wrapped.save_pretrained(tmp_path / "source")
    import_checkpoint(tmp_path / "source", tmp_path / "run")
    done = export(tmp_path / "run", tmp_path / "out")
    assert (done.tokenizer, done.texts) == (True, 0)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("abba")["input_ids"] == [5, 4, 3]
    there, here = (files_of(tmp_path / name) for name in ("source", "out"))
    del there["model.safetensors"], here["model.safetensors"]
    assert here == there
    own = open_trained(tmp_path / "run").tokenizer
    assert (own.encode("abba"), own.eod, own.unknown) == ([5, 4, 3], 2, 0)


def test_sentencepieces_file_alone_becomes_a_tokenizer(corpus_dir, tmp_path):
    from transformers import AutoTokenizer

    llama(tmp_path / "source")
    shutil.copy(corpus_dir / TOKENIZER_MODEL, tmp_path / "source")
    import_checkpoint(tmp_path / "source", tmp_path / "run")
    export(tmp_path / "run", tmp_path / "out")
    fast = AutoTokenizer.from_pretrained(tmp_path / "out")
    own = open_tokenizer(corpus_dir / TOKENIZER_MODEL)
    assert fast("def main(")["input_ids"] == own.encode("def main(")
    assert (fast.bos_token_id, fast.eos_token_id, fast.model_max_length) == (1, own.eod, 2048)


def test_a_run_trained_with_another_tokenizer_is_exported_with_that_one(corpus_dir, tmp_path):
    llama(tmp_path / "source")
    import_checkpoint(tmp_path / "source", tmp_path / "run")
    (tmp_path / "run" / IMPORTED / "tokenizer.json").write_text("{}")
    shutil.copy(corpus_dir / TOKENIZER_MODEL, tmp_path / "run")  # as training does
    export(tmp_path / "run", tmp_path / "out")
    own = open_tokenizer(corpus_dir / TOKENIZER_MODEL)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["bos_token_id"] == config["eos_token_id"] == own.eod
    assert config["max_position_embeddings"] == 2048
    assert len(json.loads((tmp_path / "out" / "tokenizer.json").read_text())["model"]["vocab"]) == own.vocab_size


def test_the_maximum_length_grows_only_after_training_longer_sequences(tmp_path):
    llama(tmp_path / "source", max_position_embeddings=64)
    import_checkpoint(tmp_path / "source", tmp_path / "run", ["data.sequence_length=128"])
    model = open_decoder(tmp_path / "run", torch.device("cpu"))
    kept = Kept.of(tmp_path / "run")
    assert own_fields(model, None, kept)["max_position_embeddings"] == 64
    assert own_fields(replace(model, step=1), None, kept)["max_position_embeddings"] == 128


def test_missing_fields_are_kept_with_the_default_of_the_family(tmp_path):
    """An export to another architecture would have other defaults."""
    model = llama(tmp_path / "source")
    path = tmp_path / "source" / "config.json"
    said = {key: value for key, value in json.loads(path.read_text()).items() if key not in SPECIAL}
    del said["max_position_embeddings"]
    path.write_text(json.dumps(said))
    import_checkpoint(tmp_path / "source", tmp_path / "run")
    fields = Kept.of(tmp_path / "run").fields
    plain = type(model.config)()
    assert fields == {name: getattr(plain, name) for name in (*SPECIAL, "max_position_embeddings")}


def test_a_megatron_run_keeps_the_files_too(corpus_dir, tmp_path):
    """For Megatron, ``convert`` creates the run from a canonical one."""
    llama(tmp_path / "source")
    with_tokenizer(tmp_path / "source", corpus_dir / TOKENIZER_MODEL)
    import_checkpoint(tmp_path / "source", tmp_path / "run", ["engine=megatron"])
    files = model_files(tmp_path / "run")
    assert files[TOKENIZER_MODEL] == (corpus_dir / TOKENIZER_MODEL).read_bytes()
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert files[f"{IMPORTED}/{name}"] == (tmp_path / "source" / name).read_bytes()


@pytest.mark.parametrize("content", [b"IQ== 0\nIg== 1\n", b"\xff\x00rubbish"], ids=["tiktoken", "rubbish"])
def test_a_tokenizer_file_that_is_not_sentencepieces_is_refused_at_import(tmp_path, content):
    llama(tmp_path / "source")
    (tmp_path / "source" / TOKENIZER_MODEL).write_bytes(content)
    with pytest.raises(
        UserError, match=r"source/tokenizer\.model is (not a sentencepiece model|a tiktoken file.*); move"
    ):
        import_checkpoint(tmp_path / "source", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_more_ids_than_embedding_rows_are_refused_at_import(corpus_dir, tmp_path):
    llama(tmp_path / "source", 96)
    size = open_tokenizer(corpus_dir / TOKENIZER_MODEL).vocab_size
    with pytest.raises(UserError, match=rf"data\.dirs: .* has {size} token ids, more than the checkpoint's vocab"):
        import_checkpoint(tmp_path / "source", tmp_path / "run", [f"data.dirs=[{corpus_dir}]"])
    import_checkpoint(tmp_path / "source", tmp_path / "later", [f"data.dirs=[{tmp_path / 'not_yet'}]"])
    shutil.copy(corpus_dir / TOKENIZER_MODEL, tmp_path / "source")
    with pytest.raises(UserError, match=rf"vocab_size=96: .*tokenizer\.model has {size} ids"):
        import_checkpoint(tmp_path / "source", tmp_path / "run")
    with pytest.raises(UserError, match="later exists; name a new directory"):
        import_checkpoint(tmp_path / "nothing", tmp_path / "later")
    assert load_config(tmp_path / "later" / "config.yaml").model.vocab_size == 96
