"""Checkpoints of LongCat-Flash (transformers: ``LongcatFlashForCausalLM``) from and to runs with its layers."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dynmoe.config import load_config
from dynmoe.errors import ConfigError, UserError
from dynmoe.hf import command
from dynmoe.hf.export import export
from dynmoe.hf.gguf_tensors import find_architecture
from dynmoe.hf.importing import import_checkpoint
from tests.hf.cases import TOP_K, YARN, begin, run_decoder, some_tokens
from tests.hf.test_import import imported
from tests.moe.cases import LATENT, LONGCAT, tiny_model

EXPERTS = 4
IDENTITY = 3
STRETCHED = {
    "rope_type": "yarn", "rope_theta": 500.0, "factor": 8.0, "original_max_position_embeddings": 8, "beta_fast": 4.0,
    "mscale": 0.8, "mscale_all_dim": 0.8,
}  # fmt: skip
CHECKPOINTS = {
    "published": {},
    "stretched": {"rope_parameters": STRETCHED, "tie_word_embeddings": True},
    # transformers cannot run a model with moe_topk=1.
    "one layer, two experts": {"num_layers": 1, "moe_topk": 2, "rms_norm_eps": 1e-6, "routed_scaling_factor": 1.0},
}
OURS = [*LONGCAT, "model.layers=4", "model.init_std=0.2"]
RUNS = {
    "published": OURS,
    "stretched": [*OURS, *YARN, "model.tie_embeddings=true"],
    "one epsilon": [*OURS, "model.layers=2", "model.latent.norm_eps=null", "model.norm_eps=1e-6"],
}


def checkpoint(folder: Path, vocab_size: int = 96, **settings):
    """Saves a model of transformers in which every tensor matters, but for those of identity experts."""
    from transformers import LongcatFlashConfig, LongcatFlashForCausalLM

    config = LongcatFlashConfig(**{
        "vocab_size": vocab_size, "hidden_size": 16, "num_layers": 2, "num_attention_heads": 2, "ffn_hidden_size": 32,
        "expert_ffn_hidden_size": 24, "n_routed_experts": EXPERTS, "zero_expert_num": IDENTITY, "moe_topk": 3,
        "q_lora_rank": 14, "kv_lora_rank": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 8, "head_dim": 8,
        "v_head_dim": 10, "max_position_embeddings": 64, "pad_token_id": 0,
        "routed_scaling_factor": 2.5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, **settings,
    })  # fmt: skip
    model = LongcatFlashForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "norm." in name:
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
            elif not name.endswith("inv_freq"):
                tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
    model.save_pretrained(folder)
    return model


def unread(name: str) -> bool:
    return any(f".experts.{EXPERTS + number}." in name for number in range(IDENTITY))


@torch.no_grad()
def run_theirs(model, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits and, for each MoE layer, the selected experts without identity experts, [B, S, E]."""
    maps: list[Tensor] = []
    hooks = [
        layer.mlp.router.register_forward_hook(
            lambda router, inputs, found: maps.append(
                torch.zeros(tokens.numel(), router.n_routed_experts)
                .scatter_(1, found[2], 1.0)
                .bool()[:, : router.num_experts]
                .view(*tokens.shape, -1)
            )
        )
        for layer in model.model.layers
    ]
    logits = model(tokens).logits
    for hook in hooks:
        hook.remove()
    return logits, maps


def compare(decoder, model) -> None:
    tokens = some_tokens(90)
    logits, maps = run_decoder(decoder, tokens)
    expected, selected = run_theirs(model, tokens)
    assert len(maps) == len(selected) > 0
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(maps, selected, strict=True))
    assert len({int(count) for routed in maps for count in routed.sum(dim=-1).flatten()}) > 1
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", ["saved", "without unread", "state_dict"])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_logits_and_routing_of_transformers(tmp_path, name, form):
    model = checkpoint(tmp_path / "source", **CHECKPOINTS[name])
    path = tmp_path / "source" / "model.safetensors"
    tensors = load_file(path)
    assert any(map(unread, tensors))
    if form == "without unread":
        save_file({key: value for key, value in tensors.items() if not unread(key)}, path, {"format": "pt"})
    if form == "state_dict":
        tensors = {key: value.clone() for key, value in model.state_dict().items()}
        assert len(tensors["model.layers.0.mlp.experts.gate_up_proj"]) == EXPERTS + IDENTITY
        save_file(tensors, path)
    architecture, decoder = imported(tmp_path / "source", tmp_path / "run")
    assert architecture == "longcat_flash"
    compare(decoder, model)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_an_imported_checkpoint_is_exported_with_identical_weights(tmp_path, name):
    from transformers import LongcatFlashForCausalLM

    model = checkpoint(tmp_path / "source", **CHECKPOINTS[name])
    import_checkpoint(tmp_path / "source", tmp_path / "run")
    assert export(tmp_path / "run", tmp_path / "out").architecture == "longcat_flash"
    there, here = (load_file(tmp_path / folder / "model.safetensors") for folder in ("source", "out"))
    assert there.keys() == here.keys()
    assert all(
        torch.equal(torch.zeros_like(value) if unread(key) else value, here[key]) for key, value in there.items()
    )
    again, found = LongcatFlashForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(found.values()), found
    tokens = some_tokens(90)
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize(("extra", "problem"), [
    (["model.latent.scale_latents=false"], r"model\.latent\.scale_latents=False: is True in LongCat-Flash"),
    (["model.latent.q_lora_rank=null"], r"model\.latent\.q_lora_rank=None: "),
    (["model.latent.norm_eps=null"], r"model\.latent\.norm_eps=None: is 1e-06 in .*model\.norm_eps, 1e-05\)"),
    (["model.moe.shortcut=false"], r"model\.moe\.shortcut=False: is True in"),
    (["model.moe.moe_layer_freq=3", "model.layers=5"], r"model\.moe\.moe_layer_freq=3: is 2 in"),
    (["model.moe.first_k_dense_replace=2"], r"model\.moe\.first_k_dense_replace=2: is 0 in"),
    (["model.moe.shared_hidden=8"], r"model\.moe\.shared_hidden=8: is 0 in"),
    (["model.moe.experts_by_layer=[4,3]"], r"model\.moe\.experts_by_layer=\[4, 3\]: LongCat-Flash has as many"),
    (["model.router.num_zero=2"], r"model\.router\.num_zero=2: is 0 in"),
    (["model.router.num_constant=1"], r"model\.router\.num_constant=1: is 0 in"),
    (["model.router.n_group=2"], r"model\.router\.n_group=2: is 1 in"),
    (["model.window=4"], r"model\.window=4: LongCat-Flash has none; run it with"),
    (["model.router.budgets=[1,2]", "budget.method=loss_free", "budget.experts_per_token=1"], r"router\.budgets="),
])  # fmt: skip
def test_other_models_are_refused_by_name(corpus_dir, tmp_path, extra, problem):
    begun = begin(corpus_dir, tmp_path / "run", [*OURS, *extra])
    with pytest.raises(UserError, match=problem):
        export(begun.path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_router_is_refused(corpus_dir, tmp_path):
    fields = [*LATENT, "model.moe.shortcut=true", "model.moe.moe_layer_freq=2", "model.layers=4", *TOP_K]
    begun = begin(corpus_dir, tmp_path / "run", [*fields, "model.latent.scale_latents=true"])
    with pytest.raises(UserError, match=r"^model\.router\.kind='top_k': is 'identity_experts' in LongCat-Flash; "):
        export(begun.path, tmp_path / "out")


def test_our_own_code_and_llama_cpp_have_no_shortcut(corpus_dir, tmp_path):
    shortcut = ["model.moe.shortcut=true", "model.moe.moe_layer_freq=2", "model.layers=4", *TOP_K]
    begun = begin(corpus_dir, tmp_path / "run", shortcut)
    with pytest.raises(UserError, match=r"^model\.moe\.shortcut=True: is exported with latent attention alone"):
        export(begun.path, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"^model\.moe\.shortcut=True: llama\.cpp adds the output"):
        find_architecture(tiny_model(*shortcut))
    begun = begin(corpus_dir, tmp_path / "whole", OURS)
    with pytest.raises(UserError, match=r"^--own-code: .*exported as transformers' longcat_flash$"):
        export(begun.path, tmp_path / "out", own_code=True)


@pytest.mark.parametrize(("change", "problem"), [
    ({"head_dim": 4}, "head_dim=4: only 8 can be imported"),
    ({"qk_head_dim": 16}, "qk_head_dim=16: only 14 can be imported"),
    ({"num_key_value_heads": 1}, "num_key_value_heads=1: only 2 can be imported"),
    ({"attention_bias": True}, "attention_bias=True: only False"),
    ({"router_bias": True}, "router_bias=True: only False"),
    ({"zero_expert_num": 0}, "zero_expert_num=0: must be a positive integer"),
    ({"zero_expert_type": "copy"}, "zero_expert_type='copy': only 'identity'"),
    ({"attention_method": "GQA"}, "attention_method='GQA': only 'MLA'"),
    ({"mla_scale_q_lora": False}, "mla_scale_q_lora=False: only True"),
    ({"mla_scale_kv_lora": False}, "mla_scale_kv_lora=False: only True"),
    ({"rope_parameters": STRETCHED | {"mscale_all_dim": 0.5}}, r"mscale=0\.8, mscale_all_dim=0\.5: only equal ones"),
    ({"rope_interleave": False}, "rope_interleave=False: its effect is unknown"),
])  # fmt: skip
def test_fields_that_we_do_not_have_are_refused(tmp_path, change, problem):
    checkpoint(tmp_path / "source")
    path = tmp_path / "source" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=problem):
        import_checkpoint(tmp_path / "source", tmp_path / "run")


def test_a_published_file_is_imported_by_the_command_without_its_prediction_layers(tmp_path, monkeypatch, capsys):
    """transformers ignores them too. Published files have fields that transformers does not, and lack others."""
    model = checkpoint(tmp_path / "source")
    path = tmp_path / "source" / "config.json"
    published = {
        "attention_method": "MLA", "mla_scale_q_lora": True, "mla_scale_kv_lora": True, "zero_expert_type": "identity",
        "router_bias": False, "rope_theta": 500.0,
    }  # fmt: skip
    given = json.loads(path.read_text()) | published
    path.write_text(json.dumps({key: value for key, value in given.items() if key != "rope_parameters"}))
    file = tmp_path / "source" / "model.safetensors"
    behind = {f"model.mtp.layers.0.{name}.weight": torch.ones(16) for name in ("enorm.m", "hnorm.m", "eh_proj")}
    save_file(load_file(file) | behind, file, {"format": "pt"})
    monkeypatch.setattr(sys, "argv", ["dynmoe.hf", "import", str(tmp_path / "source"), str(tmp_path / "run")])
    command.main()
    said = capsys.readouterr().out
    assert "(longcat_flash)" in said
    assert "Left out: 3 tensors of layers that predict further tokens, such as model.mtp.layers.0." in said
    compare(imported(tmp_path / "source", tmp_path / "again")[1], model)
    states = [load_config(tmp_path / run / "config.yaml", []).model for run in ("run", "again")]
    assert states[0] == states[1]
