"""Imported checkpoints give their original logits in our decoder; unsupported ones are refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dynmoe.engines import canonical_state
from dynmoe.errors import UserError
from dynmoe.hf.export import export
from dynmoe.hf.importing import import_checkpoint
from dynmoe.model import Decoder
from dynmoe.train.checkpoint import latest_valid
from harness.processes import WarmTraining
from tests.hf.cases import STANDARD, begin, run_decoder, some_tokens, train_run, twenty_steps
from tests.routing.test_golden import GOLDEN

RELEASES = ["dynamic_moe_tiny", "dynamic_moe_every_2", "dynamic_moe_every_3"]
RELEASED = GOLDEN / RELEASES[0]


def imported(source: Path, run: Path, *overrides: str) -> tuple[str, Decoder]:
    """Imports a checkpoint; returns its architecture and the decoder of the new run."""
    architecture, config = import_checkpoint(source, run, overrides)
    checkpoint = latest_valid(run / "checkpoints").path
    decoder = Decoder(config.model, canonical_state.read_shape(checkpoint, "w_embed_VD")[0], seed=1)
    canonical_state.load_weights(checkpoint, decoder, decoder.moe_layers)
    return architecture, decoder


@pytest.mark.parametrize("name", RELEASES)
def test_the_papers_own_release(name, tmp_path):
    """Written and run by the released code, with experts in every layer, every second, and every third."""
    architecture, decoder = imported(GOLDEN / name, tmp_path / "run")
    assert architecture == "dynamic_moe"
    expected = load_file(GOLDEN / name / "expected.safetensors")
    logits, maps = run_decoder(decoder, expected["input_ids"])
    torch.testing.assert_close(logits, expected["logits"], rtol=0, atol=1e-4)
    assert torch.equal(torch.stack([routed.sum(dim=-1) for routed in maps]), expected["experts_per_token"])


def _made_by_transformers(name: str, folder: Path):
    """A checkpoint with random weights, saved by transformers."""
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
        "qwen2_moe": lambda: transformers.Qwen2MoeConfig(
            moe_intermediate_size=24, intermediate_size=32, shared_expert_intermediate_size=16, num_experts=4,
            num_experts_per_tok=2, mlp_only_layers=[0], **common,
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


@pytest.mark.parametrize("name", ["llama", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe"])
def test_checkpoints_saved_by_transformers(tmp_path, name):
    model = _made_by_transformers(name, tmp_path / "source")
    architecture, decoder = imported(tmp_path / "source", tmp_path / "run")
    assert architecture == name
    tokens = some_tokens(96)
    with torch.no_grad():
        torch.testing.assert_close(run_decoder(decoder, tokens)[0], model(tokens).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "qwen3_moe"])
def test_stacked_experts_as_in_a_state_dict(tmp_path, name):
    model = _made_by_transformers(name, tmp_path / "source")
    tensors = {key: value.clone() for key, value in model.state_dict().items()}
    assert "model.layers.0.mlp.experts.gate_up_proj" in tensors
    save_file(tensors, tmp_path / "source" / "model.safetensors")
    _, decoder = imported(tmp_path / "source", tmp_path / "run")
    tokens = some_tokens(96)
    with torch.no_grad():
        torch.testing.assert_close(run_decoder(decoder, tokens)[0], model(tokens).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("left", ["both", "whole", "shards"])
def test_a_single_file_and_shards_are_read_in_the_order_of_transformers(tmp_path, left):
    import transformers

    source = tmp_path / "source"
    _made_by_transformers("mixtral", source)
    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        model.model.norm.weight.mul_(-1)
    model.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    for path in (tmp_path / "shards").glob("model*.safetensors*"):
        if left != "whole" or path.name.endswith("index.json"):
            shutil.copy(path, source)
    if left == "shards":
        (source / "model.safetensors").unlink()
    expected = transformers.AutoModelForCausalLM.from_pretrained(source).eval()
    assert torch.equal(expected.model.norm.weight, model.model.norm.weight) == (left == "shards")
    _, decoder = imported(source, tmp_path / "run")
    assert torch.equal(decoder.norm.weight, expected.model.norm.weight)


@pytest.mark.parametrize("name", ["llama", "mixtral", "olmoe", "qwen3_moe", "qwen3_moe, dense"])
def test_an_export_is_imported_with_identical_weights(corpus_dir, tmp_path, name):
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


def test_every_tensor_that_does_not_match_is_named(tmp_path):
    def change(weights):
        del weights["model.norm.weight"], weights["model.layers.2.mlp.experts.7.up_proj.weight"]
        weights["model.layers.9.input_norm.weight"] = torch.ones(64)
        weights["model.layers.0.mlp.router.weight"] = torch.ones(7, 64)

    with pytest.raises(UserError) as refused:
        import_checkpoint(_changed(tmp_path, change), tmp_path / "run")
    for words in (
        "missing: model.layers.2.mlp.experts.7.up_proj.weight, model.norm.weight",
        "unexpected: model.layers.9.input_norm.weight",
        "wrong shape: model.layers.0.mlp.router.weight has (7, 64), must have (8, 64)",
    ):
        assert words in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.bool])
def test_quantized_weights_are_refused_by_name(tmp_path, kind):
    def change(weights):
        name = "model.layers.1.self_attn.q_proj.weight"
        weights[name] = (weights[name] > 0).to(torch.float32).to(kind)

    with pytest.raises(UserError, match=r"layers\.1\.self_attn\.q_proj\.weight is \w+; quantized weights are not"):
        import_checkpoint(_changed(tmp_path, change), tmp_path / "run")


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, kind, value):
    def change(weights):
        weights["model.layers.3.mlp.experts.5.up_proj.weight"][7, 3] = value
        weights |= {name: weight.to(kind) for name, weight in weights.items()}

    with pytest.raises(UserError, match=r"layers\.3\.mlp\.experts\.5\.up_proj\.weight has 1 values that are not fin"):
        import_checkpoint(_changed(tmp_path, change), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_error_with_many_names_stays_short(tmp_path):
    source = _changed(tmp_path, lambda weights: [weights.pop(name) for name in list(weights)[1:]])
    with pytest.raises(UserError, match=r"missing: .* and \d+ more$") as refused:
        import_checkpoint(source, tmp_path / "run")
    assert len(str(refused.value)) < 1000


@pytest.mark.parametrize(("changes", "words"), [
    ({"model_type": "gpt2"}, "model_type='gpt2': cannot be imported"),
    ({"model_type": ["llama"]}, "cannot be imported"),
    ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ({"attention_bias": True}, "attention_bias=True"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type='dynamic'"),
    ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config=.*quantized weights are not supported"),
    ({"sliding_window": 32}, "sliding_window=32"),
    ({"hidden_size": None}, "hidden_size is missing"),
    ({"hidden_size": "wide"}, "hidden_size='wide': must be a positive integer"),
    ({"top_p_threshold": 7}, r"model\.router\.p=7"),
    ({"num_hidden_layers": 3}, "unexpected: model.layers.3"),
])  # fmt: skip
def test_unsupported_configurations_are_refused(tmp_path, changes, words):
    source = _changed(tmp_path, lambda weights: None)
    settings = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(settings | changes))
    with pytest.raises(UserError, match=words):
        import_checkpoint(source, tmp_path / "run")


def test_missing_and_invalid_files_are_refused(tmp_path):
    source = _changed(tmp_path, lambda weights: None)
    with pytest.raises(UserError, match=r"config\.json: No such file"):
        import_checkpoint(tmp_path, tmp_path / "run")
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickles are not read"):
        import_checkpoint(source, tmp_path / "run")
    (source / "model.safetensors").write_bytes(b"rubbish")
    with pytest.raises(UserError, match=r"model\.safetensors: "):
        import_checkpoint(source, tmp_path / "run")
    (source / "model.safetensors").unlink()
    (source / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../etc/passwd"}}')
    with pytest.raises(UserError, match="must be an index of files in the same directory"):
        import_checkpoint(source, tmp_path / "run")
    (source / "config.json").write_text("[]")
    with pytest.raises(UserError, match=r"config\.json: must be a JSON object"):
        import_checkpoint(source, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("engine", [
    pytest.param(["parallel.expert=2"], id="EP 2"),
    pytest.param(["engine=megatron", "parallel.tensor=2"], id="Megatron TP 2"),
])  # fmt: skip
def test_training_starts_from_the_imported_weights(corpus_dir, tmp_path, engine):
    """In either engine the first loss is that of the imported weights, and the loss decreases."""
    begun = begin(corpus_dir, tmp_path / "origin", [*STANDARD["mixtral"], "model.kv_heads=2"])
    export(begun.path, tmp_path / "out")
    run = tmp_path / "run"
    import_checkpoint(tmp_path / "out", run, [*twenty_steps(corpus_dir), *engine])
    rows, batch = train_run(run, corpus_dir, tmp_path, 2)
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
    problem = "the tokenizer differs from the one that the weights were trained with; prepare the corpora with"
    assert problem in process.output()
