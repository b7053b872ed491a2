"""Checkpoints of DeepSeek-V3 (transformers: ``DeepseekV3ForCausalLM``) from and to runs with latent attention."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dynmoe.data.batches import Batch
from dynmoe.errors import UserError
from dynmoe.hf import command
from dynmoe.hf.export import export
from dynmoe.hf.importing import import_checkpoint
from dynmoe.trained import open_decoder
from tests.hf.cases import YARN, begin, run_decoder, some_tokens
from tests.hf.test_import import imported
from tests.moe.cases import BASELINES, LATENT

STRETCHED = {
    "rope_type": "yarn", "rope_theta": 500.0, "factor": 8.0, "original_max_position_embeddings": 8, "beta_fast": 4.0,
    "mscale": 0.8, "mscale_all_dim": 0.8,
}  # fmt: skip
CHECKPOINTS = {
    "published": {},
    "queries from the input": {"q_lora_rank": None},
    "no groups, another epsilon": {"n_group": 1, "topk_group": 1, "rms_norm_eps": 1e-2},
    "halves": {"rope_interleave": False},
    "stretched": {"rope_parameters": STRETCHED},
    "stretched alike": {
        "rope_parameters": STRETCHED | {"mscale": None, "mscale_all_dim": None, "attention_factor": 1.0}
    },
    "two shared experts": {"n_shared_experts": 2, "norm_topk_prob": False, "tie_word_embeddings": True},
}
OURS = [
    *LATENT, "model.router.kind=top_k", "model.router.k=2", "model.router.score_function=sigmoid",
    "model.router.renormalize=true", "model.router.gate_scale=2.5", "model.router.n_group=2",
    "model.moe.first_k_dense_replace=1", "model.moe.experts=8", "model.moe.shared_hidden=48", "model.norm_eps=1e-6",
]  # fmt: skip
RUNS = {
    "published": OURS,
    "queries from the input": [*OURS, "model.latent.q_lora_rank=null"],
    "no groups": [*OURS, "model.router.n_group=1", "model.router.renormalize=false"],
    "another epsilon": [*OURS, "model.norm_eps=1e-2", "model.latent.norm_eps=1e-6"],
    "stretched": [*OURS, *YARN],
    "stretched by a factor": [*OURS, *YARN, "model.rope_scaling.attention_factor=1.2"],
    "stretched alike": [*OURS, *YARN, "model.rope_scaling.attention_factor=1", "model.tie_embeddings=true"],
}


def checkpoint(folder: Path, vocab_size: int = 96, **settings):
    """Saves a model of transformers in which every tensor matters."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = DeepseekV3Config(**{
        "vocab_size": vocab_size, "hidden_size": 16, "intermediate_size": 32, "moe_intermediate_size": 24,
        "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 2, "n_shared_experts": 1,
        "n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1,
        "q_lora_rank": 14, "kv_lora_rank": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 8, "v_head_dim": 10,
        "max_position_embeddings": 64, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, **settings,
    })  # fmt: skip
    model = DeepseekV3ForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("norm.weight"):
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
            elif name.endswith("e_score_correction_bias"):
                tensor.copy_(0.2 * torch.randn(tensor.shape, generator=generator))
            elif not name.endswith("inv_freq"):
                tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def run_theirs(model, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits and, for each MoE layer, the selected experts [B, S, E]."""
    maps: list[Tensor] = []
    for layer in model.model.layers:
        if hasattr(layer.mlp, "gate"):
            experts = layer.mlp.gate.num_experts
            layer.mlp.gate.register_forward_hook(
                lambda module, inputs, found, experts=experts: maps.append(
                    torch.zeros(tokens.numel(), experts).scatter_(1, found[2], 1.0).bool().view(*tokens.shape, -1)
                )
            )
    return model(tokens).logits, maps


def compare(decoder, model) -> None:
    tokens = some_tokens(90)
    logits, maps = run_decoder(decoder, tokens)
    expected, selected = run_theirs(model, tokens)
    assert len(maps) == len(selected) > 0
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(maps, selected, strict=True))
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("stacked", [False, True], ids=["saved", "state_dict"])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_logits_and_routing_of_transformers(tmp_path, name, stacked):
    model = checkpoint(tmp_path / "source", **CHECKPOINTS[name])
    if stacked:
        tensors = {key: value.clone() for key, value in model.state_dict().items()}
        assert "model.layers.1.mlp.experts.gate_up_proj" in tensors
        save_file(tensors, tmp_path / "source" / "model.safetensors")
    architecture, decoder = imported(tmp_path / "source", tmp_path / "run")
    assert architecture == "deepseek_v3"
    compare(decoder, model)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_an_imported_checkpoint_is_exported_with_identical_weights(tmp_path, name):
    from transformers import DeepseekV3ForCausalLM

    model = checkpoint(tmp_path / "source", **CHECKPOINTS[name])
    import_checkpoint(tmp_path / "source", tmp_path / "run")
    assert export(tmp_path / "run", tmp_path / "out").architecture == "deepseek_v3"
    if name != "halves":  # which is exported with neighbours
        there, here = (load_file(tmp_path / folder / "model.safetensors") for folder in ("source", "out"))
        assert there.keys() == here.keys()
        assert all(torch.equal(value, here[key]) for key, value in there.items())
    again, found = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(found.values()), found
    tokens = some_tokens(90)
    with torch.no_grad():
        torch.testing.assert_close(again(tokens).logits, model(tokens).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("extra", "problem"), [
    (["model.router.score_function=softmax"], r"model\.router\.score_function='softmax': is 'sigmoid' in DeepSeek-V3"),
    (["model.router.n_group=8", "model.router.topk_group=2"], r"model\.router\.n_group=8: .*at least two experts"),
    (["model.moe.shared_hidden=0"], r"model\.moe\.shared_hidden=0: "),
    (["model.moe.shared_hidden=40"], r"model\.moe\.shared_hidden=40: .*model\.moe\.expert_hidden=24"),
    (["model.moe.shared_gate=true"], r"model\.moe\.shared_gate=True: "),
    (["model.moe.moe_layer_freq=2"], r"model\.moe\.moe_layer_freq=2: is 1 in"),
    (["model.moe.experts_by_layer=[8,4]"], r"model\.moe\.experts_by_layer=\[8, 4\]: "),
    (["model.moe.experts=0", "model.moe.shared_hidden=0"], r"model\.moe\.experts=0: "),
    (["model.norm_eps=1e-5"], r"model\.latent\.norm_eps=None: is 1e-06 in DeepSeek-V3 .*model\.norm_eps, 1e-05"),
    (["model.window=4"], r"model\.window=4: DeepSeek-V3 has none"),
    (["model.latent.scale_latents=true"], r"model\.latent\.scale_latents=True: is False in"),
    ([*YARN, "model.rope_scaling.factor=1", "model.rope_scaling.attention_factor=1.2"], r"attention_factor=1\.2: "),
    (["model.router.budgets=[1,2]", "budget.method=loss_free", "budget.experts_per_token=2"], r"router\.budgets="),
])  # fmt: skip
def test_other_models_with_latent_attention_are_refused_by_name(corpus_dir, tmp_path, extra, problem):
    begun = begin(corpus_dir, tmp_path / "run", [*OURS, *extra])
    with pytest.raises(UserError, match=problem):
        export(begun.path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_our_own_code_has_no_latent_attention(corpus_dir, tmp_path):
    begun = begin(corpus_dir, tmp_path / "run", OURS)
    with pytest.raises(UserError, match=r"^--own-code: our code has no latent attention; without it"):
        export(begun.path, tmp_path / "out", own_code=True)


@pytest.mark.parametrize(("change", "problem"), [
    ({"head_dim": 4}, "head_dim=4: only 8 can be imported"),
    ({"num_key_value_heads": 1}, "num_key_value_heads=1: only 2 can be imported"),
    ({"attention_bias": True}, "attention_bias=True: only False"),
    ({"scoring_func": "softmax"}, "scoring_func='softmax': only 'sigmoid'"),
    ({"topk_method": "greedy"}, "topk_method='greedy': only 'noaux_tc'"),
    ({"rope_parameters": STRETCHED | {"mscale_all_dim": 0.5}}, r"mscale=0\.8, mscale_all_dim=0\.5: only equal ones"),
    ({"rope_parameters": STRETCHED | {"mscale": None, "mscale_all_dim": None}}, "mscale=None, mscale_all_dim=None"),
    ({"n_shared_experts": 0}, "n_shared_experts=0: must be a positive integer"),
])  # fmt: skip
def test_fields_that_we_do_not_have_are_refused(tmp_path, change, problem):
    checkpoint(tmp_path / "source")
    path = tmp_path / "source" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=problem):
        import_checkpoint(tmp_path / "source", tmp_path / "run")


def test_published_fields_are_accepted_and_balancing_goes_on_by_biases(tmp_path):
    checkpoint(tmp_path / "source")
    path = tmp_path / "source" / "config.json"
    published = {
        "aux_loss_alpha": 0.001, "ep_size": 1, "moe_layer_freq": 1, "scoring_func": "sigmoid", "seq_aux": True,
        "topk_method": "noaux_tc", "num_nextn_predict_layers": 1,
    }  # fmt: skip
    path.write_text(json.dumps(json.loads(path.read_text()) | published))
    _, config = import_checkpoint(tmp_path / "source", tmp_path / "run")
    assert config.budget.method == "loss_free"
    assert config.model.router.resolved.balance_loss == 0.0


def test_layers_that_predict_further_tokens_are_left_out_with_a_line(tmp_path, monkeypatch, capsys):
    """transformers reads such a file too, and does not use them; without their mark they are unexpected."""
    model = checkpoint(tmp_path / "source")
    path = tmp_path / "source" / "model.safetensors"
    tensors = load_file(path)
    behind = {
        name.replace("layers.2.", "layers.3."): value.clone() for name, value in tensors.items() if "layers.2." in name
    }
    marks = {f"model.layers.3.{name}.weight": torch.ones(16) for name in ("enorm", "hnorm")}
    marks["model.layers.3.eh_proj.weight"] = torch.ones(16, 32)
    save_file(tensors | behind | marks, path, {"format": "pt"})
    monkeypatch.setattr(sys, "argv", ["dynmoe.hf", "import", str(tmp_path / "source"), str(tmp_path / "run")])
    command.main()
    wanted = f"Left out: {len(behind) + 3} tensors of layers that predict further tokens, such as model.layers.3."
    assert wanted in capsys.readouterr().out
    compare(imported(tmp_path / "source", tmp_path / "again")[1], model)
    save_file(tensors | behind, path, {"format": "pt"})
    with pytest.raises(UserError, match=r"unexpected: model\.layers\.3\."):
        import_checkpoint(tmp_path / "source", tmp_path / "other")


PUBLISHED = (
    "embed_tokens.weight", "enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight",
    "shared_head.head.weight",
)  # fmt: skip


@pytest.mark.parametrize("tied", [[], ["model.tie_embeddings=true"]], ids=["untied", "tied"])
def test_layers_that_predict_further_tokens_are_written_as_published_and_imported_again(corpus_dir, tmp_path, tied):
    """Beside what every layer has; the names are those of the published index of DeepSeek-V3's last layer."""
    from transformers import DeepseekV3ForCausalLM

    begun = begin(corpus_dir, tmp_path / "run_biased", [*OURS, *tied, "model.mtp.layers=2"])
    export(begun.path, tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    tensors = load_file(path)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_nextn_predict_layers"] == 2
    last = {name.removeprefix("model.layers.2.") for name in tensors if name.startswith("model.layers.2.")}
    for layer in (3, 4):
        own = {name: value for name, value in tensors.items() if name.startswith(f"model.layers.{layer}.")}
        assert {name.removeprefix(f"model.layers.{layer}.") for name in own} == last | set(PUBLISHED)
        assert torch.equal(own[f"model.layers.{layer}.eh_proj.weight"], begun.decoder.layers[layer].join.w_join)
        assert torch.equal(own[f"model.layers.{layer}.embed_tokens.weight"], begun.decoder.w_embed_VD)
        assert torch.equal(own[f"model.layers.{layer}.shared_head.head.weight"], begun.decoder.output_weight_VD)
    state = begun.decoder.state_dict()
    for lacks in (False, True):  # a file need not repeat embedding and output projection
        again = [name for name in tensors if "layers" in name and name.endswith(("embed_tokens.weight", "head.weight"))]
        kept = {name: value for name, value in tensors.items() if not lacks or name not in again}
        save_file(kept, path, {"format": "pt"})
        import_checkpoint(tmp_path / "out", tmp_path / f"again_{lacks}", ["model.mtp.layers=2"])
        found = open_decoder(tmp_path / f"again_{lacks}", mtp=True).decoder.state_dict()
        assert found.keys() == state.keys()
        assert all(torch.equal(value, state[key]) for key, value in found.items())
    compare(
        imported(tmp_path / "out", tmp_path / "without")[1], DeepseekV3ForCausalLM.from_pretrained(tmp_path / "out")
    )
    other = {name: value + 1 if name.endswith("4.embed_tokens.weight") else value for name, value in tensors.items()}
    save_file(other, path, {"format": "pt"})
    with pytest.raises(UserError, match=r"layers\.4\.embed_tokens\.weight differs from that of the model"):
        import_checkpoint(tmp_path / "out", tmp_path / "other", ["model.mtp.layers=2"])


@torch.no_grad()
def test_transformers_predicts_the_same_further_tokens(corpus_dir, tmp_path):
    """As its speculative decoding computes them: from the output of the final norm, and of each layer's own."""
    from transformers import DeepseekV3ForCausalLM
    from transformers.modeling_layers import MtpModel

    begun = begin(corpus_dir, tmp_path / "run_biased", [*OURS, "model.mtp.layers=2"])
    export(begun.path, tmp_path / "out")
    main = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "out")
    main._keys_to_ignore_on_load_unexpected = [r"model\.layers\.[34]\."]  # by which it finds them; otherwise 61
    theirs = MtpModel.from_pretrained(main)
    assert theirs.num_mtp_layers == 2
    tokens = some_tokens()
    length = tokens.shape[1]
    decoder = begun.decoder
    found = []
    for layer in decoder.layers[3:]:
        layer.register_forward_hook(lambda module, inputs, output: found.append(output @ decoder.output_weight_VD.T))
    made = Batch(tokens, tokens).looking_ahead(2)
    decoder(tokens, tokens, ahead=[(own.tokens_BS, own.labels_BS) for own in made.ahead])
    hidden = main(tokens, output_hidden_states=True).hidden_states[-1]
    for depth in (1, 2):
        places = torch.arange(depth, length)[None].expand(len(tokens), -1)
        hidden = theirs.forward_layer(
            depth - 1, hidden[:, : length - depth], places, None, input_ids=tokens[:, depth:]
        )  # fmt: skip
        logits = theirs._project_to_logits(hidden)
        torch.testing.assert_close(found[depth - 1][:, : length - depth], logits, rtol=0, atol=1e-5)


def test_other_exports_leave_the_layers_out_with_a_line(corpus_dir, tmp_path, monkeypatch, capsys):
    fields = [*BASELINES["top_any improved"], "model.mtp.layers=1"]
    begun = begin(corpus_dir, tmp_path / "run", fields)
    monkeypatch.setattr(sys, "argv", ["dynmoe.hf", "export", str(begun.path), str(tmp_path / "out")])
    command.main()
    assert "Left out: the layers that predict further tokens (1)." in capsys.readouterr().out
    assert not any("layers.3." in name for name in load_file(tmp_path / "out" / "model.safetensors"))
    with pytest.raises(UserError, match=r"^model\.mtp\.layers=1: a checkpoint of dynmoe has no such layers"):
        import_checkpoint(tmp_path / "out", tmp_path / "again", ["model.mtp.layers=1"])
