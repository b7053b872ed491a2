"""DeepSeek-V3 (arXiv 2412.19437) in transformers: what a decoder of ours must be, and its ``config.json``."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping
from operator import attrgetter
from typing import Any

from dynmoe.config import ModelConfig
from dynmoe.hf.fields import write_rope
from dynmoe.routers import TopK

# Of the norms of the latents, whatever ``rms_norm_eps`` says; in LongCat-Flash too.
LATENT_EPS = 1e-6
# Fields of ours that have the same value in every DeepSeek-V3.
_FIXED = {
    "moe.moe_layer_freq": 1, "moe.shared_gate": False, "router.kind": "top_k", "router.score_function": "sigmoid",
    "router.budgets": [], "moe.shortcut": False, "latent.scale_latents": False,
}  # fmt: skip


def misfits(model: ModelConfig) -> Iterator[tuple[str, str]]:
    """Fields that keep a model with latent attention from being a DeepSeek-V3, with what is wrong about them."""
    moe = model.moe
    if not model.moe_layers:
        yield "moe.experts", "DeepSeek-V3 has experts"
    yield from fixed_misfits(model, _FIXED, "DeepSeek-V3")
    if not moe.shared_hidden or moe.shared_hidden % moe.expert_hidden:
        problem = (
            f"DeepSeek-V3 has shared experts of the width of the others (model.moe.expert_hidden={moe.expert_hidden})"
        )
        yield "moe.shared_hidden", problem
    if model.max_experts_per_layer < 2 * model.router.n_group:
        yield "router.n_group", "a group of DeepSeek-V3 has at least two experts"
    yield from latent_misfits(model, "DeepSeek-V3")


def fixed_misfits(model: ModelConfig, fixed: Mapping[str, Any], family: str) -> Iterator[tuple[str, str]]:
    """The same for fields that have one value in the whole family."""
    for name, wanted in fixed.items():
        if attrgetter(name)(model) != wanted:
            yield name, f"is {wanted!r} in {family}"


def latent_misfits(model: ModelConfig, family: str) -> Iterator[tuple[str, str]]:
    """The same for what all families with latent attention have in common."""
    scaling = model.rope_scaling
    if len(set(model.moe.experts_by_layer)) > 1:
        yield "moe.experts_by_layer", f"{family} has as many in every layer"
    if model.window is not None:
        yield "window", f"{family} has none"
    if model.latent_norm_eps != LATENT_EPS:
        yield "latent.norm_eps", f"is {LATENT_EPS} in {family} (null: model.norm_eps, {model.norm_eps:g})"
    if scaling.factor == 1.0 and scaling.query_key_scale != 1.0:
        yield "rope_scaling.attention_factor", f"{family} has none without model.rope_scaling.factor"


def to_transformers(model: ModelConfig) -> dict[str, Any]:
    """Fields of ``config.json`` that Llama does not have, or of which it has another value.

    Rotated rows are neighbours in our exports, as in the published checkpoints.
    """
    router = model.router.resolved
    assert isinstance(router, TopK)
    return latent_fields(model) | {
        "rope_interleave": True,
        "n_routed_experts": model.max_experts_per_layer,
        "n_shared_experts": model.moe.shared_hidden // model.moe.expert_hidden,
        "moe_intermediate_size": model.moe.expert_hidden,
        "first_k_dense_replace": model.moe.first_k_dense_replace,
        "num_experts_per_tok": router.k,
        "n_group": router.n_group,
        "topk_group": router.topk_group,
        "norm_topk_prob": router.renormalize,
        "routed_scaling_factor": router.gate_scale,
        "num_nextn_predict_layers": model.mtp.layers,
    }


def latent_fields(model: ModelConfig) -> dict[str, Any]:
    """Fields of latent attention, in any family."""
    latent = model.latent
    return {
        "q_lora_rank": latent.q_lora_rank,
        "kv_lora_rank": latent.kv_lora_rank,
        "qk_nope_head_dim": latent.qk_nope_head_dim,
        "qk_rope_head_dim": latent.qk_rope_head_dim,
        "v_head_dim": latent.v_head_dim,
        "head_dim": latent.qk_rope_head_dim,
        "attention_bias": False,
        "rope_parameters": _rope(model),
    }


def _rope(model: ModelConfig) -> dict[str, Any]:
    """``rope_parameters``, in which YaRN's factor of whole queries and keys is a multiple of ln(factor)."""
    scaling = model.rope_scaling
    written = write_rope(model.rope_theta, scaling)
    if scaling.kind != "yarn":
        return written
    excess = scaling.query_key_scale - 1.0
    multiple = excess / (0.1 * math.log(scaling.factor)) if excess else 0.0
    return written | {"attention_factor": 1.0, "mscale": multiple, "mscale_all_dim": multiple}


def is_interleaved(found: Mapping[str, Any]) -> bool:
    """Whether a checkpoint with this ``config.json`` rotates neighbouring rows together."""
    return bool(found.get("rope_interleave", True))


def prediction_tensors(names: Collection[str], layers: int) -> list[str]:
    """Tensors of the layers behind the last of ``layers`` that predict further tokens (section 2.2).

    The model in transformers does not have them. Such a layer has a projection of its two inputs, ``eh_proj``.
    """
    layer_of = {name: int(found[1]) for name in names if (found := re.match(r"model\.layers\.(\d+)\.", name))}
    behind = {layer for name, layer in layer_of.items() if layer >= layers and name.endswith(".eh_proj.weight")}
    return sorted(name for name, layer in layer_of.items() if layer in behind)
