"""Checkpoints of others compute in our decoder what they compute at home; what does not fit is refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bench.processes import WarmTraining
from dynmoe.data.batches import PretrainingData
from dynmoe.data.corpus import Corpus
from dynmoe.engines import plain_state
from dynmoe.errors import UserError
from dynmoe.hf.export import export
from dynmoe.hf.importing import import_checkpoint
from dynmoe.model import Decoder
from dynmoe.train.checkpoint import newest_sound
from tests.hf.cases import STANDARD, begin, run_decoder, some_tokens
from tests.routing.test_golden import GOLDEN
from tests.train.cases import read_rows

RELEASED = GOLDEN / "dynamic_moe_tiny"


def imported(source: Path, run: Path, *overrides: str) -> tuple[str, Decoder]:
    """The maker of a checkpoint, and the decoder of the run that begins with it."""
    maker, config = import_checkpoint(source, run, overrides)
    checkpoint = newest_sound(run / "checkpoints").path
    decoder = Decoder(config.model, plain_state.read_shape(checkpoint, "w_embed_VD")[0], seed=1)
    plain_state.load_weights(checkpoint, decoder, decoder.moe_layers)
    return maker, decoder


def test_the_papers_own_release(tmp_path):
    maker, decoder = imported(RELEASED, tmp_path / "run")
    assert maker == "dynamic_moe"
    expected = load_file(RELEASED / "expected.safetensors")
    logits, maps = run_decoder(decoder, expected["input_ids"])
    torch.testing.assert_close(logits, expected["logits"], rtol=0, atol=1e-4)
    assert torch.equal(torch.stack([routed.sum(dim=-1) for routed in maps]), expected["experts_per_token"])


def test_the_papers_release_with_dense_layers(tmp_path):
    """``expert_frequency`` 2: layers 1 and 3 are one SwiGLU, which is what a single expert of gate 1 would be."""
    weights, settings = load_file(RELEASED / "model.safetensors"), json.loads((RELEASED / "config.json").read_text())
    for layer in (1, 3):
        names = [name for name in weights if name.startswith(f"model.layers.{layer}.mlp.")]
        for name in names:
            tensor = weights.pop(name)
            if ".experts.5." in name:
                weights[name.replace(".experts.5.", ".")] = tensor
    (tmp_path / "source").mkdir()
    save_file(weights, tmp_path / "source" / "model.safetensors")
    (tmp_path / "source" / "config.json").write_text(json.dumps(settings | {"expert_frequency": 2}))
    _, decoder = imported(tmp_path / "source", tmp_path / "run")
    _, whole = imported(RELEASED, tmp_path / "whole")
    for layer in (1, 3):
        router, moe = whole.layers[layer].moe.router, whole.layers[layer].moe
        router.register_forward_hook(lambda module, inputs, plan: _only(plan, 5))
        assert moe.num_experts == 8
    tokens = load_file(RELEASED / "expected.safetensors")["input_ids"]
    logits, maps = run_decoder(decoder, tokens)
    assert len(maps) == 2
    torch.testing.assert_close(logits, run_decoder(whole, tokens)[0], rtol=0, atol=1e-5)


def _only(plan, expert):
    """The plan in which every token uses one expert, at gate 1."""
    from dataclasses import replace

    chosen = torch.zeros_like(plan.routing_map_TE)
    chosen[:, expert] = True
    return replace(plan, gates_TE=chosen.float(), routing_map_TE=chosen, selected_map_TE=chosen)


def _made_by_transformers(name: str, folder: Path):
    """A checkpoint of random weights that transformers itself has saved."""
    import transformers

    common = {
        "vocab_size": 96, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1,
        "max_position_embeddings": 64, "initializer_range": 0.3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    }  # fmt: skip
    config = {
        "llama": lambda: transformers.LlamaConfig(intermediate_size=32, head_dim=12, **common),
        "mixtral": lambda: transformers.MixtralConfig(intermediate_size=24, num_local_experts=4, **common),
        "olmoe": lambda: transformers.OlmoeConfig(
            intermediate_size=24, num_experts=4, num_experts_per_tok=2, pad_token_id=None, eos_token_id=2, **common
        ),
        "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
            moe_intermediate_size=24, intermediate_size=32, num_experts=4, num_experts_per_tok=2, head_dim=12,
            mlp_only_layers=[1], norm_topk_prob=True, tie_word_embeddings=True, **common,
        ),
    }[name]()  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", ["llama", "mixtral", "olmoe", "qwen3_moe"])
def test_checkpoints_that_transformers_has_saved(tmp_path, name):
    model = _made_by_transformers(name, tmp_path / "source")
    maker, decoder = imported(tmp_path / "source", tmp_path / "run")
    assert maker == name
    tokens = some_tokens(96)
    with torch.no_grad():
        torch.testing.assert_close(run_decoder(decoder, tokens)[0], model(tokens).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "mixtral", "olmoe", "qwen3_moe", "qwen3_moe, dense"])
def test_an_export_comes_back_as_it_was(corpus_dir, tmp_path, name):
    run = begin(corpus_dir, tmp_path / "run", STANDARD[name])
    export(run.path, tmp_path / "out")
    _, decoder = imported(tmp_path / "out", tmp_path / "again")
    for own, parameter in run.decoder.named_parameters():
        assert torch.equal(dict(decoder.named_parameters())[own], parameter), own


def _changed(tmp_path: Path, change) -> Path:
    source = tmp_path / "source"
    shutil.copytree(RELEASED, source)
    weights = load_file(source / "model.safetensors")
    change(weights)
    save_file(weights, source / "model.safetensors")
    return source


def test_every_tensor_that_does_not_fit_is_named(tmp_path):
    def change(weights):
        del weights["model.norm.weight"], weights["model.layers.2.mlp.experts.7.up_proj.weight"]
        weights["model.layers.9.input_norm.weight"] = torch.ones(64)
        weights["model.layers.0.mlp.router.weight"] = torch.ones(7, 64)

    with pytest.raises(UserError) as refused:
        import_checkpoint(_changed(tmp_path, change), tmp_path / "run")
    for words in (
        "missing: model.layers.2.mlp.experts.7.up_proj.weight, model.norm.weight",
        "surplus: model.layers.9.input_norm.weight",
        "model.layers.0.mlp.router.weight has shape (7, 64) where (8, 64) is wanted",
    ):
        assert words in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "gpt2"}, "model_type='gpt2' cannot be imported"),
        ({"model_type": ["llama"]}, "cannot be imported"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type='linear'"),
        ({"sliding_window": 32}, "sliding_window=32"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "wide"}, "hidden_size='wide' is not a positive number"),
        ({"top_p_threshold": 7}, r"model\.router\.p=7"),
        ({"num_hidden_layers": 3}, "surplus: model.layers.3"),
    ],
)
def test_a_configuration_that_is_not_ours_is_refused(tmp_path, changes, words):
    source = _changed(tmp_path, lambda weights: None)
    settings = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(settings | changes))
    with pytest.raises(UserError, match=words):
        import_checkpoint(source, tmp_path / "run")


def test_files_that_are_none_are_refused(tmp_path):
    source = _changed(tmp_path, lambda weights: None)
    with pytest.raises(UserError, match=r"config\.json: No such file"):
        import_checkpoint(tmp_path, tmp_path / "run")
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickles are not read"):
        import_checkpoint(source, tmp_path / "run")
    (source / "model.safetensors").write_bytes(b"rubbish")
    with pytest.raises(UserError, match=r"model\.safetensors: "):
        import_checkpoint(source, tmp_path / "run")
    (source / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../etc/passwd"}}')
    with pytest.raises(UserError, match="is not an index of files beside it"):
        import_checkpoint(source, tmp_path / "run")
    (source / "config.json").write_text("[]")
    with pytest.raises(UserError, match="is not the configuration of a model"):
        import_checkpoint(source, tmp_path / "run")


@pytest.mark.parametrize(
    "engine",
    [
        pytest.param(["parallel.expert=2"], id="EP 2", marks=pytest.mark.slow),
        pytest.param(["engine=megatron", "parallel.tensor=2"], id="Megatron TP 2"),
    ],
)
def test_a_training_begins_with_what_was_imported(corpus_dir, tmp_path, engine):
    """In either engine the loss of the first step is that of the imported weights, and it falls."""
    begun = begin(corpus_dir, tmp_path / "origin", [*STANDARD["mixtral"], "model.kv_heads=2"])
    export(begun.path, tmp_path / "out")
    fields = [
        f"data.dirs=[{corpus_dir}]", "data.sequence_length=32", "train.global_batch=4", "train.micro_batch=2",
        "train.steps=20", "optimizer.lr=1e-2", "schedule.warmup_steps=0", "logging.interval=1", "eval.batches=2",
    ]  # fmt: skip
    run = tmp_path / "run"
    import_checkpoint(tmp_path / "out", run, [*fields, *engine])
    process = WarmTraining([str(run / "config.yaml")], 2, 0, tmp_path / "output.txt", {}, None)
    assert process.wait() == 0, process.output()
    rows = read_rows(run / "metrics.jsonl")
    data = PretrainingData([Corpus.open(corpus_dir)], [], 32, 0, tmp_path / "index")
    data.prepare(0, 4)
    batch = data.train_batch(range(4))
    with torch.no_grad():
        first = begun.decoder(batch.tokens_BS, batch.labels_BS).item()
    assert rows[0]["train/step"] == 1
    assert rows[0]["train/lm_loss"] == pytest.approx(first, rel=1e-5)
    assert rows[-1]["train/lm_loss"] < first - 0.5


def test_another_tokenizer_than_that_of_the_weights_is_refused(corpus_dir, tmp_path):
    from dynmoe.train.run_directory import RunDirectory

    begun = begin(corpus_dir, tmp_path / "run", [])
    with RunDirectory(begun.path).tokenizer.open("ab") as stream:
        stream.write(b"\x00")
    fields = ["data.sequence_length=32", "train.steps=2", "train.global_batch=4", "train.micro_batch=4"]
    process = WarmTraining([str(begun.path / "config.yaml"), *fields], 1, 0, tmp_path / "output.txt", {}, None)
    assert process.wait() != 0
    assert "encoded by another tokenizer than the weights were trained with; prepare them with" in process.output()
