"""DynMoE's released adaptation and Dynamic_MoE's released model, against values computed by their code."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from dynmoe.config import load_config
from dynmoe.model import Decoder
from dynmoe.moe import MoEContext, MoELayer
from dynmoe.moe.adaptation import Adaptation
from dynmoe.moe.observation import Wanted, reduce_observations
from tests.routing.test_golden import GOLDEN, TOP_ANY, close

ADAPTIVE = sorted({name.split(".")[0] for name in TOP_ANY if name.startswith("adaptive")})


class PlainRenewal:
    """Parameters without an optimizer."""

    @torch.no_grad()
    def renew(self, parameter, index, fresh):
        parameter[index] = fresh


@pytest.mark.parametrize("case", ADAPTIVE)
def test_one_released_window_and_update(case):
    def golden(name):
        return TOP_ANY[f"{case}.{name}"].clone()

    passes_x = golden("x")
    width, experts = golden("sim_before").shape
    config = load_config(None, [
        f"model.hidden={width}", "model.heads=1", "model.kv_heads=1", f"model.moe.experts={experts}",
        "model.moe.expert_hidden=8", "model.router.kind=top_any", "model.router.form=released", "adaptation.interval=1",
        "adaptation.policy=released",
    ])  # fmt: skip
    layer = MoELayer(config.model, 0, 0, MoEContext(observing=Wanted(unclaimed=True)))
    router = layer.router
    with torch.no_grad():
        router.prototypes_DE.copy_(golden("sim_before"))
        router.thresholds_E.copy_(golden("thr_before"))
        router.active_E.copy_(golden("mask_before").bool())
    for x_TD in passes_x:
        layer(x_TD)
    observations = reduce_observations([layer], None, Wanted(unclaimed=True))
    assert torch.equal(observations[0].selected_E, golden("routing_records").double())
    close(observations[0].unclaimed_D.float(), golden("unrouted_sum"))
    Adaptation(config.adaptation, PlainRenewal()).update([layer], observations, step=1)
    assert torch.equal(router.active_E, golden("mask_after").bool())
    assert torch.equal(router.thresholds_E, golden("thr_after"))
    kept = (golden("sim_before") == golden("sim_after")).all(dim=0)
    assert torch.equal(router.prototypes_DE[:, kept], golden("sim_after")[:, kept])
    close(router.prototypes_DE.detach(), golden("sim_after"))


@torch.no_grad()
def load_released(model: Decoder, weights: dict[str, torch.Tensor]) -> None:
    """Puts a released Dynamic_MoE checkpoint into our decoder."""

    def released(name: str) -> torch.Tensor:
        return weights.pop(f"model.{name}.weight")

    model.w_embed_VD.copy_(released("embed_tokens"))
    model.w_out_VD.copy_(weights.pop("lm_head.weight"))
    model.norm.weight.copy_(released("norm"))
    for index, layer in enumerate(model.layers):
        name = f"layers.{index}"
        layer.attention_norm.weight.copy_(released(f"{name}.input_norm"))
        layer.ffn_norm.weight.copy_(released(f"{name}.post_attention_norm"))
        layer.attention.w_qkv.copy_(torch.cat([released(f"{name}.self_attn.{part}_proj") for part in "qkv"]))
        layer.attention.w_out.copy_(released(f"{name}.self_attn.o_proj"))
        layer.moe.router.weight_ED.copy_(released(f"{name}.mlp.router"))
        for expert in range(layer.moe.num_experts):
            parts = SimpleNamespace(
                **{part: released(f"{name}.mlp.experts.{expert}.{part}_proj") for part in ("gate", "up", "down")}
            )
            layer.moe.experts.w_up_EHD[expert] = torch.cat([parts.gate, parts.up])
            layer.moe.experts.w_down_EDF[expert] = parts.down
    assert not weights, f"not taken over: {sorted(weights)}"


def test_a_released_model_gives_the_same_logits_and_experts_per_token():
    folder = GOLDEN / "dynamic_moe_tiny"
    released = json.loads((folder / "config.json").read_text())
    expected = load_file(folder / "expected.safetensors")
    config = load_config(None, [
        f"model.hidden={released['hidden_size']}", f"model.layers={released['num_hidden_layers']}",
        f"model.heads={released['num_attention_heads']}", f"model.kv_heads={released['num_key_value_heads']}",
        f"model.moe.experts={released['num_experts']}", f"model.moe.expert_hidden={released['intermediate_size']}",
        f"model.norm_eps={released['rms_norm_eps']}", f"model.rope_theta={released['rope_theta']}",
        f"model.router.p={released['top_p_threshold']}", "model.router.form=released",
    ])  # fmt: skip
    model = Decoder(config.model, released["vocab_size"], seed=0).eval()
    load_released(model, load_file(folder / "model.safetensors"))
    chosen = []
    for layer in model.moe_layers:
        layer.router.register_forward_hook(lambda module, inputs, plan: chosen.append(plan.experts_per_token_T))
    with torch.no_grad():
        logits = model(expected["input_ids"])
    shape = expected["experts_per_token"].shape[1:]
    assert torch.equal(torch.stack([count.view(shape) for count in chosen]), expected["experts_per_token"])
    close(logits, expected["logits"])
