"""Reads the fields of each family's ``config.json`` into fields of our model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dynmoe.errors import UserError
from dynmoe.hf.deepseek_v3 import LATENT_EPS
from dynmoe.hf.fields import RESTORE, Settings, shown

CODE = {
    "AutoConfig": "configuration_dynmoe.DynMoEConfig",
    "AutoModel": "modeling_dynmoe.DynMoEModel",
    "AutoModelForCausalLM": "modeling_dynmoe.DynMoEForCausalLM",
    "AutoModelForSequenceClassification": "modeling_dynmoe.DynMoEForSequenceClassification",
}


def _read_attention(get: Settings) -> dict[str, Any]:
    heads = get.count("num_attention_heads")
    width = get.optional("head_dim")
    return {
        "kv_heads": heads if get.optional("num_key_value_heads") is None else get.count("num_key_value_heads"),
        "rope_theta": get.rope_theta(),
        **{f"rope_scaling.{name}": value for name, value in get.rope_scaling().items()},
        **({} if width is None or width * heads == get.count("hidden_size") else {"head_dim": width}),
    }


def _read_bias(get: Settings) -> dict[str, Any]:
    biased = "attention_bias" in get and get.optional("attention_bias")
    return {"attention_bias": "all"} if biased else {}


def _read_llama(get: Settings) -> dict[str, Any]:
    return {**_read_attention(get), **_read_bias(get), "ffn_hidden": get.count("intermediate_size"), "moe.experts": 0}


def _read_mixtral(get: Settings) -> dict[str, Any]:
    return {**_read_top_k(get), "window": get.optional("sliding_window")}


def _read_olmoe(get: Settings) -> dict[str, Any]:
    return _read_top_k(get) | _read_bias(get) | {"qk_norm": "projection", "router.renormalize": get["norm_topk_prob"]}


def _read_top_k(get: Settings) -> dict[str, Any]:
    return {**_read_attention(get), **_experts(get, "intermediate_size"), **_choice(get, True)}


def _read_qwen3(get: Settings) -> dict[str, Any]:
    return {
        **_read_attention(get),
        **_read_bias(get),
        "qk_norm": "head",
        "window": _switched_window(get),
        **_read_qwen(get),
    }


def _read_qwen2(get: Settings) -> dict[str, Any]:
    """Reads Qwen2-MoE; a shared expert with zero weights is removed later, see ``qwen2_moe.py``."""
    return {
        **_read_attention(get),
        **_read_windows(get, _switched_window(get)),
        **_read_qwen(get),
        "moe.shared_hidden": get["shared_expert_intermediate_size"],
    }


def _switched_window(get: Settings) -> Any:
    """The window of families with a switch for it."""
    return get.optional("sliding_window") if get["use_sliding_window"] else None


def _read_windows(get: Settings, window: Any) -> dict[str, Any]:
    """Reads ``layer_types``, which older files do not have; then all layers attend to everything."""
    kinds = get.optional("layer_types") if "layer_types" in get else None
    unknown = [kind for kind in kinds or [] if kind not in ("full_attention", "sliding_attention")]
    if unknown or (kinds and "sliding_attention" in kinds and window is None):
        problem = "has no window" if not unknown else "cannot be imported"
        raise UserError(f"config.json: layer_types={shown(kinds)}: {problem}; {RESTORE}")
    if kinds is None and window is not None:
        raise UserError("config.json: layer_types is missing; add it to the file, or install transformers")
    full = [layer for layer, kind in enumerate(kinds or []) if kind == "full_attention"]
    if kinds is None or len(full) == len(kinds):
        return {}
    return {"window": window, "full_attention_layers": full}


def _read_qwen(get: Settings) -> dict[str, Any]:
    layers = get.count("num_hidden_layers")
    decoder_sparse_step = get.count("decoder_sparse_step")
    listed = get.optional("mlp_only_layers")
    dense = set(listed or []) | {n for n in range(layers) if (n + 1) % decoder_sparse_step}
    return {
        "ffn_hidden": get.count("intermediate_size"),
        **_dense_layers(layers, dense, f"{decoder_sparse_step=}, mlp_only_layers={shown(listed)}"),
        **_experts(get, "moe_intermediate_size"),
        **_choice(get, get["norm_topk_prob"]),
    }


def _dense_layers(layers: int, dense: set[int], source: str) -> dict[str, int]:
    """The fields of our model with exactly these dense layers."""
    first = min(set(range(layers)) - dense, default=0)
    for freq in range(1, layers + 1):
        if {layer for layer in range(layers) if layer < first or layer % freq} == dense:
            return {"moe.moe_layer_freq": freq} | ({"moe.first_k_dense_replace": first} if first else {})
    problem = f"dense layers are {sorted(dense)}; only experts in every n-th layer, from some layer on, can be imported"
    raise UserError(f"config.json: {source}: {problem}")


def _read_dynmoe(get: Settings) -> dict[str, Any]:
    """Reads an export of ours; older exports name ``layer_experts`` ``num_experts``."""
    layers = get.count("num_hidden_layers")
    name = "layer_experts" if "layer_experts" in get else "num_experts"
    experts = get[name]
    code = get["auto_map"]
    base = get["rope_theta"]
    if not isinstance(experts, list) or len(experts) != layers or any(type(n) is not int or n < 0 for n in experts):
        raise UserError(f"config.json: {name}={shown(experts)}: must be {layers} integers, one per layer; {RESTORE}")
    if not isinstance(code, Mapping) or any(str(n).rpartition("--")[2] != CODE.get(k) for k, n in code.items()):
        raise UserError(f"config.json: auto_map={shown(code)}: must refer to our own code")
    if get.rope_theta() != base:
        raise UserError(f"config.json: rope_parameters: rope_theta={get.rope_theta()}: must equal rope_theta={base}")
    numbers = [count for count in experts if count]
    dense = {layer for layer, count in enumerate(experts) if not count}
    return {
        **_read_attention(get),
        **_read_windows(get, get.optional("sliding_window") if "sliding_window" in get else None),
        "attention_bias": get.optional("attention_bias") if "attention_bias" in get else None,
        "qk_norm": get.optional("qk_norm"),
        "ffn_hidden": get.count("intermediate_size"),
        "moe.experts": max(numbers, default=0),
        **(_dense_layers(layers, dense, f"{name}={shown(experts)}") if numbers else {}),
        "moe.experts_by_layer": numbers if len(set(numbers)) > 1 else [],
        "moe.expert_hidden": get.count("moe_intermediate_size"),
        "moe.shared_hidden": get["shared_expert_intermediate_size"],
        "moe.shared_gate": "shared_expert_gate" in get and get["shared_expert_gate"],
    }


def _read_dynamic_moe(get: Settings) -> dict[str, Any]:
    """Reads the release of arXiv 2403.07652: top-p, experts in every ``expert_frequency``-th layer from the first.

    Its code ignores ``num_key_value_heads`` (it has one per query head) and ``rope_theta``.
    """
    heads = get.count("num_attention_heads")
    if scaling := get.rope_scaling():
        raise UserError(f"config.json: rope_scaling: rope_type={scaling['kind']!r}: this family has none")
    if "num_key_value_heads" in get and get.optional("num_key_value_heads") not in (None, heads):
        problem = f"the released code uses num_attention_heads ({heads}); {RESTORE}"
        raise UserError(f"config.json: num_key_value_heads={shown(get['num_key_value_heads'])}: {problem}")
    return {
        "kv_heads": heads,
        "rope_theta": 10000.0,
        "ffn_hidden": get.count("intermediate_size"),
        "moe.moe_layer_freq": get.count("expert_frequency"),
        **_experts(get, "intermediate_size"),
        "router.kind": "top_p",
        "router.variant": "released",
        "router.p": get["top_p_threshold"],
    }


def _read_deepseek_v3(get: Settings) -> dict[str, Any]:
    """Reads DeepSeek-V3 (arXiv 2412.19437); several shared experts become one of their total width."""
    expert_hidden = get.count("moe_intermediate_size")
    return {
        **_read_latent(get),
        "ffn_hidden": get.count("intermediate_size"),
        "moe.experts": get.count("n_routed_experts"),
        "moe.expert_hidden": expert_hidden,
        "moe.shared_hidden": get.count("n_shared_experts") * expert_hidden,
        "moe.first_k_dense_replace": get["first_k_dense_replace"],
        "router.kind": "top_k",
        "router.k": get.count("num_experts_per_tok"),
        "router.score_function": "sigmoid",
        "router.renormalize": get["norm_topk_prob"],
        "router.gate_scale": get["routed_scaling_factor"],
        "router.n_group": get.count("n_group"),
        "router.topk_group": get.count("topk_group"),
        "router.balance_loss": 0.0,  # the biases balance the load
    }


def _read_longcat_flash(get: Settings) -> dict[str, Any]:
    """Reads LongCat-Flash (arXiv 2509.01322), of which one layer is two of ours."""
    return {
        **_read_latent(get),
        "layers": 2 * get.count("num_layers"),
        "latent.q_lora_rank": get.count("q_lora_rank"),
        "latent.scale_latents": True,
        "ffn_hidden": get.count("ffn_hidden_size", "intermediate_size"),
        "moe.shortcut": True,
        "moe.moe_layer_freq": 2,
        "moe.experts": get.count("n_routed_experts", "num_local_experts"),
        "moe.expert_hidden": get.count("expert_ffn_hidden_size", "moe_intermediate_size"),
        "router.kind": "identity_experts",
        "router.k": get.count("moe_topk", "num_experts_per_tok"),
        "router.num_identity": get.count("zero_expert_num"),
        "router.gate_scale": get["routed_scaling_factor"],
    }


def _read_latent(get: Settings) -> dict[str, Any]:
    """Reads latent attention.

    transformers normalizes the latents with an epsilon of its own, whatever ``rms_norm_eps`` says.
    """
    heads = get.count("num_attention_heads")
    rotated = get.count("qk_rope_head_dim")
    width = get.count("qk_nope_head_dim") + rotated
    for name, value in {"num_key_value_heads": heads, "head_dim": rotated, "qk_head_dim": width}.items():
        if name in get and get.optional(name) not in (None, value):
            raise UserError(f"config.json: {name}={shown(get[name])}: only {value!r} can be imported; {_BECAUSE[name]}")
    return {
        "kv_heads": heads,
        "rope_theta": get.rope_theta(),
        **{f"rope_scaling.{name}": value for name, value in get.latent_rope_scaling().items()},
        "latent.kv_lora_rank": get.count("kv_lora_rank"),
        "latent.q_lora_rank": get.optional("q_lora_rank"),
        "latent.qk_nope_head_dim": get.count("qk_nope_head_dim"),
        "latent.qk_rope_head_dim": rotated,
        "latent.v_head_dim": get.count("v_head_dim"),
        "latent.norm_eps": LATENT_EPS,
    }


_BECAUSE = {
    "num_key_value_heads": "every one of num_attention_heads has its own keys and values",
    "head_dim": "it must equal qk_rope_head_dim",
    "qk_head_dim": "it must equal qk_nope_head_dim + qk_rope_head_dim",
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


READERS: dict[str, Callable[[Settings], dict[str, Any]]] = {
    "llama": _read_llama,
    "mixtral": _read_mixtral,
    "olmoe": _read_olmoe,
    "qwen2_moe": _read_qwen2,
    "qwen3_moe": _read_qwen3,
    "deepseek_v3": _read_deepseek_v3,
    "longcat_flash": _read_longcat_flash,
    "dynamic_moe": _read_dynamic_moe,
    "dynmoe": _read_dynmoe,
}
