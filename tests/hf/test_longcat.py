"""Our layer with identity experts against the MoE block of LongCat-Flash in transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LongcatFlashConfig, LongcatFlashForCausalLM

from dynmoe.errors import UserError
from dynmoe.hf.longcat import load_longcat, longcat_tensors
from dynmoe.moe import MoEContext, MoELayer
from tests.moe.cases import EXPERTS, HIDDEN, tiny_model

IDENTITY = 3
K = 4
SCALE = 6.0
FIELDS = [
    "model.router.kind=identity_experts", f"model.router.k={K}", f"model.router.num_identity={IDENTITY}",
    f"model.router.gate_scale={SCALE}",
]  # fmt: skip
UNREAD = [f"experts.{EXPERTS + number}" for number in range(IDENTITY)]


def our_layer(*extra: str, seed: int = 0) -> MoELayer:
    return MoELayer(tiny_model(*FIELDS, *extra), 0, seed, MoEContext()).eval()


def their_model(seed: int = 0) -> LongcatFlashForCausalLM:
    """A tiny LongCat-Flash with random weights and biases that change the selection."""
    torch.manual_seed(seed)
    config = LongcatFlashConfig(
        vocab_size=32, hidden_size=HIDDEN, num_layers=1, num_attention_heads=2, ffn_hidden_size=24, q_lora_rank=8,
        kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8, head_dim=8, v_head_dim=8, expert_ffn_hidden_size=24,
        n_routed_experts=EXPERTS, zero_expert_num=IDENTITY, moe_topk=K, routed_scaling_factor=SCALE,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LongcatFlashForCausalLM(config).eval()
    block = model.model.layers[0].mlp
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=0.3)
        block.router.e_score_correction_bias.normal_(std=0.1)
    return model


@torch.no_grad()
def compare(layer: MoELayer, model: LongcatFlashForCausalLM) -> None:
    block = model.model.layers[0].mlp
    x = torch.randn(2, 50, HIDDEN, generator=torch.Generator().manual_seed(3))
    _, weights, indices = block.router(x)
    plan = layer.router(x.view(-1, HIDDEN))
    theirs = torch.zeros(100, EXPERTS + IDENTITY).scatter_(1, indices, 1.0).bool()
    assert torch.equal(plan.routing_map_TE, theirs[:, :EXPERTS])
    counts = plan.experts_per_token_T
    assert counts.min() < counts.max()
    gates = torch.zeros(100, EXPERTS + IDENTITY).scatter_(1, indices, weights)
    torch.testing.assert_close(plan.gates_TE, gates[:, :EXPERTS], rtol=1e-6, atol=0)
    expected = block(x)
    assert (layer(x) - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize("unread", ["with", "without"])
def test_a_saved_block_computes_the_same_in_our_layer(tmp_path: Path, unread):
    model = their_model()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert any(part in name for name in tensors for part in UNREAD)
    if unread == "without":
        tensors = {name: value for name, value in tensors.items() if not any(part in name for part in UNREAD)}
    layer = our_layer()
    load_longcat(layer, tensors)
    compare(layer, model)


def test_our_layer_computes_the_same_in_their_model(tmp_path: Path):
    layer = our_layer()
    with torch.no_grad():
        layer.router.bias_X.normal_(std=0.1, generator=torch.Generator().manual_seed(5))
    their_model().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    ours = longcat_tensors(layer)
    assert ours.keys() == {name for name in tensors if ".mlp." in name}
    save_file(tensors | ours, tmp_path / "model.safetensors", {"format": "pt"})
    model, report = LongcatFlashForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    compare(layer, model)
    again = our_layer(seed=1)
    load_longcat(again, longcat_tensors(layer))
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in layer.state_dict().items())


@pytest.mark.parametrize(
    "extra",
    ["model.router.num_zero=2", "model.router.num_constant=1", "model.moe.shared_hidden=8", "model.router.n_group=2"],
)
def test_a_layer_with_other_parts_is_refused(extra):
    with pytest.raises(UserError, match=extra):
        longcat_tensors(our_layer(extra, "model.router.k=3"))


def test_several_budgets_are_refused():
    budgets = ["model.router.budgets=[1,2]", "budget.method=loss_free", "budget.experts_per_token=1"]
    with pytest.raises(UserError, match=r"^model.router.budgets=\[1.0, 2.0\]: LongCat-Flash has one budget; use \[\]$"):
        longcat_tensors(our_layer(*budgets))


def test_another_router_is_refused():
    layer = MoELayer(tiny_model("model.router.kind=top_k"), 0, 0, MoEContext())
    with pytest.raises(UserError, match="LongCat-Flash has none; use identity_experts"):
        longcat_tensors(layer)


def test_tensors_that_do_not_fit_are_named():
    tensors = longcat_tensors(our_layer())
    with pytest.raises(UserError, match="name the prefix"):
        load_longcat(our_layer(), tensors, "model.layers.1.mlp")
    name = "model.layers.0.mlp.experts.1.up_proj.weight"
    with pytest.raises(UserError, match=r"experts.1.up_proj.weight: has shape \(24, 15\), must have \(24, 16\)"):
        load_longcat(our_layer(), tensors | {name: tensors[name][:, 1:]})
