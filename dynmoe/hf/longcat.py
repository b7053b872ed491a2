"""LongCat-Flash (arXiv 2509.01322) in transformers: what a decoder of ours must be, and its ``config.json``.

One of its layers is two of ours, of which the first has experts whose output is added behind the second.

transformers gives identity experts gate and up projections that nothing reads, saves them, and refuses a checkpoint
without them; published checkpoints may lack them. We write zeros and ignore what we read.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from dynmoe.config import ModelConfig
from dynmoe.hf.deepseek_v3 import fixed_misfits, latent_fields, latent_misfits
from dynmoe.routers import IdentityExperts

# Fields of ours that have the same value in every LongCat-Flash.
_FIXED = {
    "latent.scale_latents": True, "moe.shortcut": True, "moe.moe_layer_freq": 2, "moe.first_k_dense_replace": 0,
    "moe.shared_hidden": 0, "router.kind": "identity_experts", "router.num_zero": 0, "router.num_constant": 0,
    "router.n_group": 1, "router.budgets": [],
}  # fmt: skip
# Fields of Llama that have other names in LongCat-Flash.
RENAMED = ("num_hidden_layers", "intermediate_size")


def misfits(model: ModelConfig) -> Iterator[tuple[str, str]]:
    """Fields that keep a model with latent attention from being a LongCat-Flash, with what is wrong about them."""
    yield from fixed_misfits(model, _FIXED, "LongCat-Flash")
    if model.latent.q_lora_rank is None:
        yield "latent.q_lora_rank", "LongCat-Flash computes queries from a latent"
    yield from latent_misfits(model, "LongCat-Flash")


def to_transformers(model: ModelConfig) -> dict[str, Any]:
    """Fields of ``config.json`` that Llama does not have, or of which it has another value."""
    router = model.router.resolved
    assert isinstance(router, IdentityExperts)
    return latent_fields(model) | {
        "num_layers": model.layers // 2,
        "attention_method": "MLA",
        "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True,
        "qk_head_dim": model.width_of_head,
        "ffn_hidden_size": model.ffn_hidden,
        "expert_ffn_hidden_size": model.moe.expert_hidden,
        "n_routed_experts": model.max_experts_per_layer,
        "zero_expert_num": router.num_identity,
        "zero_expert_type": "identity",
        "moe_topk": router.k,
        "routed_scaling_factor": router.gate_scale,
        "router_bias": False,
    }


def unread_projections(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of identity experts."""
    router = model.router
    assert isinstance(router, IdentityExperts)
    return {
        f"model.layers.{layer // 2}.mlp.experts.{model.experts_of(layer) + number}.{part}_proj.weight": (
            model.moe.expert_hidden, model.hidden,
        )
        for layer in model.moe_layers for number in range(router.num_identity) for part in ("gate", "up")
    }  # fmt: skip


def prediction_tensors(names: Collection[str]) -> list[str]:
    """Tensors of the layers that predict further tokens, which the model in transformers does not have."""
    return sorted(name for name in names if name.startswith("model.mtp."))
