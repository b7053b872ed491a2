"""Conversion between our configuration and the ``config.json`` of transformers, in both directions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from operator import attrgetter
from typing import Any

from dynmoe.config import Config, ModelConfig
from dynmoe.errors import ConfigError, UserError
from dynmoe.hf import deepseek_v3, longcat
from dynmoe.hf.fields import FAMILIES, KEPT, check_fields, settings_of, shown, write_rope
from dynmoe.hf.qwen2_moe import ABSENT_WIDTH
from dynmoe.hf.readers import CODE, READERS
from dynmoe.hf.routers import read_router, write_router
from dynmoe.routers import IdentityExperts, TopK


def standard_architecture(model: ModelConfig) -> str | None:
    """The architecture of transformers that computes the same as ``model``; None if there is none.

    Biases of loss-free balancing are state and not considered here.
    """
    moe = model.moe
    if model.latent.enabled:
        latent, error = latent_architecture(model)
        return latent if error is None else None
    if moe.shortcut:
        return None
    if not model.moe_layers:
        whole = model.hidden % model.heads == 0  # which transformers' Llama demands even with a head_dim of its own
        name = "llama" if model.qk_norm is None and whole else None
    elif len(set(moe.experts_by_layer)) > 1 or not isinstance(model.router, TopK) or own_field(model.router):
        name = None
    else:
        plain = len(model.moe_layers) == model.layers and not moe.shared_hidden
        same_width = model.heads * model.width_of_head == model.hidden
        name = {
            "head": None if moe.shared_hidden else "qwen3_moe",
            "projection": "olmoe" if plain and same_width else None,
            None: "mixtral" if plain and model.router.resolved.renormalize else "qwen2_moe",
        }[model.qk_norm]
    has_windows = model.window is None or (name in ("mixtral", "qwen3_moe") and not model.full_attention_layers)
    has_biases = model.attention_bias is None or (name in _BIASED and model.attention_bias == "all")
    return name if has_windows and has_biases else None


def latent_architecture(model: ModelConfig) -> tuple[str, ConfigError | None]:
    """The architecture that a model with latent attention resembles, and the field that keeps it from being one."""
    is_longcat = model.moe.shortcut or isinstance(model.router, IdentityExperts)
    architecture, misfits = ("longcat_flash", longcat.misfits) if is_longcat else ("deepseek_v3", deepseek_v3.misfits)
    for name, problem in misfits(model):
        cure = "run it with python -m dynmoe.generate"
        return architecture, ConfigError(f"model.{name}", attrgetter(name)(model), problem, cure)
    return architecture, None


def own_field(router: TopK) -> str | None:
    """A field of a top-k router whose value is not expressible in any of these architectures, if there is one."""
    usual = TopK()
    names = ("budgets", "score_function", "n_group", "gate_scale")
    return next((name for name in names if getattr(router, name) != getattr(usual, name)), None)


_BIASED = ("llama", "olmoe", "qwen3_moe")  # with biases of all four projections or of none


def to_transformers(config: Config, architecture: str, vocab_size: int) -> dict[str, Any]:
    """``config.json`` of an export, except the maximum length and the special tokens.

    The base of the rotary positions is written where mlx-lm reads it (top level) and where transformers 5 does.

    Args:
        config: configuration of the run.
        architecture: ``dynmoe``, or the result of :func:`standard_architecture`.
        vocab_size: number of embedding rows.
    """
    model = config.model
    common = {
        "architectures": [FAMILIES[architecture].model_class],
        "model_type": architecture,
        "vocab_size": vocab_size,
        "hidden_size": model.hidden,
        "intermediate_size": model.ffn_hidden,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.width_of_head,
        "rms_norm_eps": model.norm_eps,
        "initializer_range": model.init_std,
        "tie_word_embeddings": model.tie_embeddings,
        "rope_theta": model.rope_theta,
        "rope_parameters": write_rope(model.rope_theta, model.rope_scaling),
    }
    if architecture == "dynmoe":
        return common | _dynmoe(config) | {"auto_map": CODE}
    common |= {"hidden_act": "silu"}
    if architecture == "deepseek_v3":
        return common | deepseek_v3.to_transformers(model)
    if architecture == "longcat_flash":
        kept = {name: value for name, value in common.items() if name not in longcat.RENAMED}
        return kept | longcat.to_transformers(model)
    if architecture in _BIASED:
        common["attention_bias"] = model.attention_bias is not None
    return common if architecture == "llama" else common | _top_k(model, architecture)


def _dynmoe(config: Config) -> dict[str, Any]:
    model = config.model
    return {
        "qk_norm": model.qk_norm,
        "attention_bias": model.attention_bias,
        "sliding_window": model.window,
        "layer_types": ["sliding_attention" if model.window_of(n) else "full_attention" for n in range(model.layers)],
        "layer_experts": [model.experts_of(n) if model.is_moe_layer(n) else 0 for n in range(model.layers)],
        "moe_intermediate_size": model.moe.expert_hidden,
        "shared_expert_intermediate_size": model.moe.shared_hidden,
        "shared_expert_gate": model.moe.shared_gate,
        "router": write_router(config),
    }


def _top_k(model: ModelConfig, architecture: str) -> dict[str, Any]:
    moe = model.moe
    assert isinstance(model.router, TopK)
    router = model.router.resolved
    named: dict[str, Any] = {"num_experts_per_tok": router.k, "router_aux_loss_coef": router.balance_loss}
    if architecture == "mixtral":
        return named | {
            "num_local_experts": model.max_experts_per_layer,
            "intermediate_size": moe.expert_hidden,
            "sliding_window": model.window,
        }
    named |= {"num_experts": model.max_experts_per_layer, "norm_topk_prob": router.renormalize}
    if architecture == "olmoe":
        return named | {"intermediate_size": moe.expert_hidden, "clip_qkv": None}
    named |= {
        "moe_intermediate_size": moe.expert_hidden,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [layer for layer in range(model.layers) if not model.is_moe_layer(layer)],
        "use_sliding_window": model.window is not None,
        "sliding_window": model.window,
    }
    if architecture == "qwen2_moe":
        return named | {"shared_expert_intermediate_size": moe.shared_hidden or ABSENT_WIDTH, "qkv_bias": True}
    return named


def from_transformers(found: Mapping[str, Any]) -> tuple[str, list[str], dict[str, Any]]:
    """Converts a ``config.json``.

    Returns:
        The family, our configuration of the model as overrides, and the fields to keep for an export (``KEPT``).

    Raises:
        UserError: the architecture is unknown, or our decoder does not support a field.
    """
    kind = found.get("model_type")
    architecture = "dynamic_moe" if kind == "llama" and "top_p_threshold" in found else str(kind)
    if architecture not in FAMILIES:
        raise UserError(f"config.json: model_type={shown(kind)}: cannot be imported; use one of {', '.join(FAMILIES)}")
    check_fields(found, FAMILIES[architecture])
    get = settings_of(found, FAMILIES[architecture])
    hidden = get.count("hidden_size")
    fields: dict[str, Any] = {
        "layers": get.count("num_hidden_layers", "num_layers"),
        "hidden": hidden,
        "heads": get.count("num_attention_heads"),
        "vocab_size": get.count("vocab_size"),
        "norm_eps": get["rms_norm_eps"],
        "tie_embeddings": get["tie_word_embeddings"],
        "init_std": get["initializer_range"],
        **READERS[architecture](get),
    }
    kept = {name: get.optional(name) for name in KEPT if name in get}
    named = {f"model.{name}": value for name, value in fields.items()}
    if architecture == "deepseek_v3":
        named["budget.method"] = "loss_free"  # its biases are trained in this way
    if architecture == "dynmoe" and fields["moe.experts"]:
        named |= read_router(get["router"], hidden)
    return architecture, [f"{name}={json.dumps(value)}" for name, value in named.items()], kept
