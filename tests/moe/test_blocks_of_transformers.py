"""Our layer against the MoE blocks of DeepSeek-V3 and Qwen2-MoE in transformers: outputs and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import DeepseekV3Config, Qwen2MoeConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

from dynmoe.moe import MoEContext, MoELayer
from tests.moe.cases import HIDDEN, tiny_model

COMMON = {"hidden_size": HIDDEN, "moe_intermediate_size": 24, "num_experts_per_tok": 3}
FIELDS = ["model.router.kind=top_k", "model.router.k=3", "model.router.balance_loss=0", "model.moe.experts=8"]


def deepseek(norm: bool) -> tuple[MoELayer, nn.Module, nn.Module, nn.Module]:
    config = DeepseekV3Config(
        **COMMON, n_routed_experts=8, n_shared_experts=2, n_group=4, topk_group=2, norm_topk_prob=norm,
        routed_scaling_factor=2.5,
    )  # fmt: skip
    layer = MoELayer(tiny_model(
        *FIELDS, "model.router.score_function=sigmoid", f"model.router.renormalize={norm}", "model.router.n_group=4",
        "model.router.topk_group=2", "model.router.gate_scale=2.5", "model.moe.shared_hidden=48",
    ), 0, 0, MoEContext())  # fmt: skip
    block = DeepseekV3MoE(config)
    layer.router.bias_E.normal_(std=0.1, generator=torch.Generator().manual_seed(5))
    block.gate.e_score_correction_bias.copy_(layer.router.bias_E)
    return layer, block, block.gate, block.shared_experts


def qwen2(norm: bool) -> tuple[MoELayer, nn.Module, nn.Module, nn.Module]:
    config = Qwen2MoeConfig(**COMMON, num_experts=8, shared_expert_intermediate_size=48, norm_topk_prob=norm)
    layer = MoELayer(tiny_model(
        *FIELDS, f"model.router.renormalize={norm}", "model.moe.shared_hidden=48", "model.moe.shared_gate=true"
    ), 0, 0, MoEContext())  # fmt: skip
    block = Qwen2MoeSparseMoeBlock(config)
    block.shared_expert_gate.weight.data.copy_(layer.shared.w_gate_1D)
    return layer, block, block.gate, block.shared_expert


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("make", [deepseek, qwen2])
def test_the_layer_computes_what_the_block_of_transformers_does(make, norm):
    layer, block, gate, shared = make(norm)
    with torch.no_grad():
        gate.weight.copy_(layer.router.weight_ED)
        block.experts.gate_up_proj.copy_(layer.experts.w_up_EHD)
        block.experts.down_proj.copy_(layer.experts.w_down_EDF)
        shared.gate_proj.weight.copy_(layer.shared.w_up_HD[:48])
        shared.up_proj.weight.copy_(layer.shared.w_up_HD[48:])
        shared.down_proj.weight.copy_(layer.shared.w_down_DF)
    generator = torch.Generator().manual_seed(1)
    x, upstream = (torch.randn(2, 40, HIDDEN, generator=generator) for _ in range(2))
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    found = layer(ours)
    expected = block(theirs)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    found.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)
    pairs = {
        "router": (layer.router.weight_ED, gate.weight),
        "experts": (layer.experts.w_up_EHD, block.experts.gate_up_proj),
        "shared": (layer.shared.w_down_DF, shared.down_proj.weight),
    }
    if make is qwen2:
        pairs["gate"] = (layer.shared.w_gate_1D, block.shared_expert_gate.weight)
    for name, (own, other) in pairs.items():
        assert own.grad.abs().max() > 1e-3
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
