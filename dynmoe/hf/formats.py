"""Configurations of transformers and ours: which architecture a model is there, and which of ours a checkpoint is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dynmoe.config import ModelConfig
from dynmoe.errors import UserError

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


def to_transformers(model: ModelConfig, maker: str, vocab_size: int, positions: int, eos: int) -> dict[str, Any]:
    """``config.json`` of an export.

    Args:
        model: the architecture.
        maker: ``dynmoe``, or what :func:`standard_architecture` says.
        vocab_size: rows of the embedding.
        positions: tokens of a training sequence.
        eos: id of the token that ends a document.
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
        "max_position_embeddings": positions,
        "rms_norm_eps": model.norm_eps,
        "initializer_range": model.init_std,
        "tie_word_embeddings": model.tie_embeddings,
        "bos_token_id": eos,  # a document begins where another ends
        "eos_token_id": eos,
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
        "num_experts": [model.experts_of(n) if model.is_moe_layer(n) else 0 for n in range(model.layers)],
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


def from_transformers(found: Mapping[str, Any]) -> tuple[str, list[str]]:
    """Whose checkpoint a ``config.json`` belongs to, and our configuration of it, as overrides.

    Raises:
        UserError: an architecture that is not known, or a setting of one that our decoder does not have.
    """
    kind = found.get("model_type")
    maker = "dynamic_moe" if kind == "llama" and found.get("num_experts") else str(kind)
    if maker not in _READERS:
        raise UserError(f"config.json: model_type={kind!r} cannot be imported; known are {', '.join(_READERS)}")
    get = _Settings(found)
    _refuse_unlike(get)
    hidden, heads = get.count("hidden_size"), get.count("num_attention_heads")
    fields = {
        "layers": get.count("num_hidden_layers"),
        "hidden": hidden,
        "heads": heads,
        "kv_heads": get("num_key_value_heads", None) or heads,
        "vocab_size": get.count("vocab_size"),
        "norm_eps": get["rms_norm_eps"],
        "rope_theta": get.rope_theta(),
        "tie_embeddings": get("tie_word_embeddings", False),
        "init_std": get("initializer_range", 0.02),
    }
    if get("head_dim", None) not in (None, hidden // heads):
        fields["head_dim"] = get["head_dim"]
    fields |= _READERS[maker](get)
    return maker, [f"model.{name}={_text(value)}" for name, value in fields.items() if value is not None]


class _Settings:
    """A configuration of transformers, whose missing fields are errors by name."""

    def __init__(self, found: Mapping[str, Any]) -> None:
        self._found = found

    def __getitem__(self, name: str) -> Any:
        if self._found.get(name) is None:
            raise UserError(f"config.json: {name} is missing; restore the checkpoint's own file")
        return self._found[name]

    def __call__(self, name: str, default: Any) -> Any:
        return self._found.get(name, default)

    def count(self, *names: str) -> int:
        """A positive whole number, under the first of these names that is there."""
        name = next((name for name in names if self._found.get(name) is not None), names[0])
        value = self[name]
        if type(value) is not int or value < 1:
            raise UserError(
                f"config.json: {name}={value!r} is not a positive number; restore the checkpoint's own file"
            )
        return value

    def rope_theta(self) -> Any:
        """Base of the rotary positions: a field of its own, or, since transformers 5, one of ``rope_parameters``."""
        rope = self("rope_parameters", None) or self("rope_scaling", None) or {}
        if not isinstance(rope, dict):
            raise UserError(f"config.json: rope_parameters={rope!r} are none; restore the checkpoint's own file")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise UserError(f"config.json: rope_type={kind!r}: our decoder has plain rotary positions only")
        return rope.get("rope_theta", self("rope_theta", 10000.0))


def _refuse_unlike(get: _Settings) -> None:
    """Settings with which the other architecture computes what our decoder does not."""
    plain: dict[str, tuple[Any, ...]] = {
        "hidden_act": ("silu",), "attention_bias": (False, None), "mlp_bias": (False, None), "clip_qkv": (None,),
        "qkv_bias": (False, None), "use_sliding_window": (False, None), "attention_multiplier": (None,),
    }  # fmt: skip
    for name, allowed in plain.items():
        value = get(name, allowed[0])
        if value not in allowed:
            raise UserError(f"config.json: {name}={value!r}: our decoder knows {allowed[0]!r} only")
    if get("use_sliding_window", None) is None and get("sliding_window", None) is not None:
        raise UserError(
            f"config.json: sliding_window={get('sliding_window', None)}: our attention sees all that is before"
        )


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value) if isinstance(value, float) else str(value)


def _read_llama(get: _Settings) -> dict[str, Any]:
    return {"ffn_hidden": get["intermediate_size"], "moe.experts": 0}


def _read_mixtral(get: _Settings) -> dict[str, Any]:
    return {
        **_experts(get.count("num_local_experts"), get.count("intermediate_size")),
        **_choice(get["num_experts_per_tok"], True, get("router_aux_loss_coef", 0.0)),
    }


def _read_olmoe(get: _Settings) -> dict[str, Any]:
    return {
        "qk_norm": "projection",
        **_experts(get.count("num_experts"), get.count("intermediate_size")),
        **_choice(get["num_experts_per_tok"], get("norm_topk_prob", False), get("router_aux_loss_coef", 0.0)),
    }


def _read_qwen(get: _Settings) -> dict[str, Any]:
    """Layers without experts must be those that our ``model.moe.every`` leaves out."""
    layers, step = get.count("num_hidden_layers"), get("decoder_sparse_step", 1)
    dense = set(get("mlp_only_layers", None) or []) | {n for n in range(layers) if (n + 1) % step}
    every = next((n for n in range(1, layers + 1) if {m for m in range(layers) if m % n} == dense), None)
    if every is None:
        raise UserError(
            f"config.json: experts in all layers but {sorted(dense)}: our decoder has them in every n-th, "
            "from the first on"
        )
    return {
        "ffn_hidden": get["intermediate_size"],
        "moe.every": every,
        **_experts(get.count("num_experts", "num_local_experts"), get.count("moe_intermediate_size")),
        **_choice(get["num_experts_per_tok"], get("norm_topk_prob", False), get("router_aux_loss_coef", 0.0)),
    }


def _read_qwen3(get: _Settings) -> dict[str, Any]:
    return {"qk_norm": "head", **_read_qwen(get)}


def _read_dynamic_moe(get: _Settings) -> dict[str, Any]:
    """The release of arXiv 2403.07652: top-p by ``top_p_threshold``, experts in every ``expert_frequency``-th layer."""
    return {
        "ffn_hidden": get["intermediate_size"],
        "moe.every": get("expert_frequency", 1),
        **_experts(get.count("num_experts"), get.count("intermediate_size")),
        "router.kind": "top_p",
        "router.form": "released",
        "router.p": get["top_p_threshold"],
    }


def _experts(count: int, width: int) -> dict[str, Any]:
    return {"moe.experts": count, "moe.expert_hidden": width}


def _choice(k: int, renormalize: bool, balance: float) -> dict[str, Any]:
    return {"router.kind": "top_k", "router.k": k, "router.renormalize": renormalize, "router.balance_loss": balance}


_READERS: dict[str, Callable[[_Settings], dict[str, Any]]] = {
    "llama": _read_llama,
    "mixtral": _read_mixtral,
    "olmoe": _read_olmoe,
    "qwen3_moe": _read_qwen3,
    "dynamic_moe": _read_dynamic_moe,
}
