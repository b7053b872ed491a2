"""Configurations of transformers and ours: which architecture a model is there, and which of ours a checkpoint is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dynmoe.config import ModelConfig
from dynmoe.errors import UserError
from dynmoe.hf.fields import FAMILIES, KEPT, Settings, check_fields, settings_of, shown

_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "dynmoe": "DynMoEForCausalLM",
}


def standard_architecture(model: ModelConfig) -> str | None:
    """The architecture of transformers that computes the same as ``model``; None: there is none.

    A biased choice (loss-free balancing) is state, and not seen here.
    """
    moe, router = model.moe, model.router
    if not model.moe_layers:
        return "llama" if model.qk_norm is None else None
    if router.kind != "top_k" or len(set(moe.experts_by_layer)) > 1:
        return None
    plain = moe.every == 1 and not moe.shared_hidden
    if model.qk_norm == "head":
        return None if moe.shared_hidden else "qwen3_moe"
    if model.qk_norm == "projection":
        return "olmoe" if plain and model.heads * model.width_of_head == model.hidden else None
    if plain and router.options.renormalize:
        return "mixtral"
    return "qwen2_moe"


def to_transformers(model: ModelConfig, maker: str, vocab_size: int) -> dict[str, Any]:
    """``config.json`` of an export, but for its longest sequence and the tokens that begin and end one.

    Args:
        model: the architecture.
        maker: ``dynmoe``, or what :func:`standard_architecture` says.
        vocab_size: rows of the embedding.
    """
    rope = {"rope_theta": model.rope_theta}
    common = {
        "architectures": [_CLASSES[maker]],
        "model_type": maker,
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
    }
    if maker == "dynmoe":
        files = {"AutoConfig": "configuration_dynmoe.DynMoEConfig"}
        for auto, name in _AUTO.items():
            files[auto] = f"modeling_dynmoe.{name}"
        return common | rope | _dynmoe(model) | {"auto_map": files}
    common |= {"hidden_act": "silu", "rope_parameters": rope | {"rope_type": "default"}}
    if maker == "llama":
        return common
    return common | _top_k(model, maker)


_AUTO = {
    "AutoModel": "DynMoEModel",
    "AutoModelForCausalLM": "DynMoEForCausalLM",
    "AutoModelForSequenceClassification": "DynMoEForSequenceClassification",
}


def _dynmoe(model: ModelConfig) -> dict[str, Any]:
    moe, router, options = model.moe, model.router, model.router.options
    settings: dict[str, Any] = {"kind": router.kind, "form": router.form, "renormalize": options.renormalize}
    if router.kind in ("top_p", "top_any", "sigmoid"):
        settings |= {"min_experts": options.min_experts, "max_experts": router.max_experts}
    if router.kind == "top_any":
        factor = {"fixed": 1.0, "sqrt_hidden": model.hidden**0.5}.get(options.temperature)
        settings["scale"] = None if factor is None else router.scale * factor
        settings |= {"weights": options.weights, "straight_through": options.straight_through}
    elif router.kind == "sigmoid":
        settings["cutoff"] = router.cutoff
    elif router.kind == "relu":
        settings["max_experts"] = router.max_experts
    if router.kind in ("top_k", "null_experts"):
        settings["k"] = router.k
    if router.kind == "null_experts":
        settings["num_null"] = router.num_null
    settings |= {"balance_per_route": options.balance_per_route, "losses": router.loss_coefficients}
    return {
        "qk_norm": model.qk_norm,
        "layer_experts": [model.experts_of(n) if model.is_moe_layer(n) else 0 for n in range(model.layers)],
        "moe_intermediate_size": moe.expert_hidden,
        "shared_expert_intermediate_size": moe.shared_hidden,
        "router": settings,
    }


def _top_k(model: ModelConfig, maker: str) -> dict[str, Any]:
    moe, router = model.moe, model.router
    balance = router.loss_coefficients.get("balance", 0.0)
    named: dict[str, Any] = {"num_experts_per_tok": router.k, "router_aux_loss_coef": balance}
    if maker == "mixtral":
        return named | {
            "num_local_experts": model.largest_layer, "intermediate_size": moe.expert_hidden, "sliding_window": None,
        }  # fmt: skip
    named |= {"num_experts": model.largest_layer, "norm_topk_prob": router.options.renormalize}
    if maker == "olmoe":
        return named | {"intermediate_size": moe.expert_hidden, "clip_qkv": None, "attention_bias": False}
    named |= {
        "moe_intermediate_size": moe.expert_hidden,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [layer for layer in range(model.layers) if not model.is_moe_layer(layer)],
        "use_sliding_window": False,
    }
    if maker == "qwen2_moe":
        return named | {"shared_expert_intermediate_size": moe.shared_hidden, "qkv_bias": False}
    return named | {"attention_bias": False}


def from_transformers(found: Mapping[str, Any]) -> tuple[str, list[str], dict[str, Any]]:
    """Whose checkpoint a ``config.json`` belongs to, and what it says.

    Returns:
        The family, our configuration of the model as overrides, and the fields that an export gives back (``KEPT``).

    Raises:
        UserError: an architecture that is not known, or a field that our decoder cannot honour, by name.
    """
    kind = found.get("model_type")
    maker = "dynamic_moe" if kind == "llama" and "top_p_threshold" in found else str(kind)
    if maker not in FAMILIES:
        raise UserError(f"config.json: model_type={shown(kind)} cannot be imported; known are {', '.join(FAMILIES)}")
    check_fields(found, FAMILIES[maker])
    get = settings_of(found, FAMILIES[maker])
    hidden, heads = get.count("hidden_size"), get.count("num_attention_heads")
    fields = {
        "layers": get.count("num_hidden_layers"),
        "hidden": hidden,
        "heads": heads,
        "vocab_size": get.count("vocab_size"),
        "norm_eps": get["rms_norm_eps"],
        "tie_embeddings": get["tie_word_embeddings"],
        "init_std": get["initializer_range"],
        **_READERS[maker](get),
    }
    kept = {name: get.optional(name) for name in KEPT if name in get}
    return maker, [f"model.{name}={_text(value)}" for name, value in fields.items()], kept


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value) if isinstance(value, float) else str(value)


def _read_attention(get: Settings) -> dict[str, Any]:
    hidden, heads = get.count("hidden_size"), get.count("num_attention_heads")
    width = get.optional("head_dim")
    return {
        "kv_heads": heads if get.optional("num_key_value_heads") is None else get.count("num_key_value_heads"),
        "rope_theta": get.rope_theta(),
        **({} if width in (None, hidden // heads) else {"head_dim": width}),
    }


def _read_llama(get: Settings) -> dict[str, Any]:
    return {**_read_attention(get), "ffn_hidden": get.count("intermediate_size"), "moe.experts": 0}


def _read_mixtral(get: Settings) -> dict[str, Any]:
    return {**_read_attention(get), **_experts(get, "intermediate_size"), **_choice(get, True)}


def _read_olmoe(get: Settings) -> dict[str, Any]:
    return {
        **_read_attention(get),
        "qk_norm": "projection",
        **_experts(get, "intermediate_size"),
        **_choice(get, get["norm_topk_prob"]),
    }


def _read_qwen3(get: Settings) -> dict[str, Any]:
    """Layers without experts must be those that our ``model.moe.every`` leaves out."""
    layers, step = get.count("num_hidden_layers"), get.count("decoder_sparse_step")
    listed = get.optional("mlp_only_layers")
    dense = set(listed or []) | {n for n in range(layers) if (n + 1) % step}
    every = next((n for n in range(1, layers + 1) if {m for m in range(layers) if m % n} == dense), None)
    if every is None:
        raise UserError(
            f"config.json: decoder_sparse_step={step} and mlp_only_layers={shown(listed)} leave experts in all layers "
            f"but {sorted(dense)}: our decoder has them in every n-th, from the first on"
        )
    return {
        **_read_attention(get),
        "qk_norm": "head",
        "ffn_hidden": get.count("intermediate_size"),
        "moe.every": every,
        **_experts(get, "moe_intermediate_size"),
        **_choice(get, get["norm_topk_prob"]),
    }


def _read_dynamic_moe(get: Settings) -> dict[str, Any]:
    """The release of arXiv 2403.07652: top-p, experts in every ``expert_frequency``-th layer from the first on.

    Its code reads neither ``num_key_value_heads``, which are as many as the others, nor ``rope_theta``.
    """
    heads = get.count("num_attention_heads")
    if "num_key_value_heads" in get and get.optional("num_key_value_heads") not in (None, heads):
        problem = f"the released code has as many as num_attention_heads ({heads})"
        raise UserError(
            f"config.json: num_key_value_heads={shown(get['num_key_value_heads'])}: {problem}; "
            "restore the checkpoint's own file"
        )
    return {
        "kv_heads": heads,
        "rope_theta": 10000.0,
        "ffn_hidden": get.count("intermediate_size"),
        "moe.every": get.count("expert_frequency"),
        **_experts(get, "intermediate_size"),
        "router.kind": "top_p",
        "router.form": "released",
        "router.p": get["top_p_threshold"],
    }


def _experts(get: Settings, width: str) -> dict[str, Any]:
    return {"moe.experts": get.count("num_experts", "num_local_experts"), "moe.expert_hidden": get.count(width)}


def _choice(get: Settings, renormalize: bool) -> dict[str, Any]:
    return {
        "router.kind": "top_k",
        "router.k": get.count("num_experts_per_tok"),
        "router.renormalize": renormalize,
        "router.balance_loss": get["router_aux_loss_coef"],
    }


_READERS: dict[str, Callable[[Settings], dict[str, Any]]] = {
    "llama": _read_llama,
    "mixtral": _read_mixtral,
    "olmoe": _read_olmoe,
    "qwen3_moe": _read_qwen3,
    "dynamic_moe": _read_dynamic_moe,
}
