"""A model as llama.cpp represents it: architecture, metadata fields, tensor names.

Names and fields follow the GGUF specification (docs/gguf.md of ggml) and the tables in the package ``gguf``. What an
architecture computes follows llama.cpp (src/models in its repository).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from dynmoe.config import ModelConfig
from dynmoe.errors import ConfigError
from dynmoe.hf.formats import own_field, standard_architecture
from dynmoe.routers import TopK

SERVERS = "serve its export (python -m dynmoe.hf export) with transformers or vLLM"
# For each architecture of transformers, llama.cpp's without and with gates that are normalized to sum to 1: in
# transformers a field selects this, in llama.cpp the architecture. Two bear the names of other, equivalent models.
_NAMES = {
    "llama": ("llama", "llama"),
    "mixtral": (None, "llama"),
    "olmoe": ("olmoe", None),
    "qwen2_moe": ("qwen2moe", "granitemoe"),
    "qwen3_moe": ("dots1", "qwen3moe"),
}
# Architectures with interleaved rotary positions: the two rows that are rotated together are neighbors.
_PAIRED = ("llama", "granitemoe")
_WITHOUT_GROUPS = ("olmoe", "dots1")  # store keys and values for every query head
_MUST_SHARE = ("qwen2moe", "dots1")  # always have a shared expert: one of zeros adds nothing
_MUST_NOT_TIE = ("olmoe", "qwen2moe", "dots1")  # always have an output matrix in addition to the embedding
_SOFTMAX = 1  # the gating function, as llama.cpp numbers them
_NEARLY_ZERO = (1e-10, 1e-24)  # too small for any input to move the sigmoid away from one half


def find_architecture(model: ModelConfig) -> str:
    """The architecture of llama.cpp that computes the same as ``model``, if the selection has no biases.

    Raises:
        ConfigError: there is none; the error names the field that rules it out.
    """
    architecture = standard_architecture(model)
    moe = model.moe
    scaling = model.rope_scaling.kind
    rank = model.latent.kv_lora_rank
    if rank is not None:
        cure = "run it with python -m dynmoe.generate"
        raise ConfigError("model.latent.kv_lora_rank", rank, "is not written into GGUF files", cure)
    if scaling is not None:
        raise ConfigError("model.rope_scaling.kind", scaling, "is not written into GGUF files", SERVERS)
    if model.attention_bias is not None:
        raise ConfigError("model.attention_bias", model.attention_bias, "is not written into GGUF files", SERVERS)
    if model.window is not None:
        raise ConfigError("model.window", model.window, "is not written into GGUF files", SERVERS)
    renormalize = isinstance(model.router, TopK) and model.router.resolved.renormalize
    if architecture is None:
        raise _without_architecture(model)
    if architecture != "llama" and len(model.moe_layers) < model.layers:
        field = "moe_layer_freq" if moe.moe_layer_freq > 1 else "first_k_dense_replace"
        problem = "llama.cpp requires experts in every layer"
        raise ConfigError(f"model.moe.{field}", getattr(moe, field), problem, SERVERS)
    name = _NAMES[architecture][bool(renormalize)]
    if name is None:
        problem = f"llama.cpp's {architecture} does not normalize the gates of a token"
        raise ConfigError("model.router.renormalize", renormalize, problem, SERVERS)
    if moe.shared_gate and name != "qwen2moe":
        problem = f"llama.cpp's {name} has no gate of the shared expert"
        raise ConfigError("model.moe.shared_gate", True, problem, SERVERS)
    if name == "qwen2moe" and model.heads * model.width_of_head != model.hidden:
        problem = f"must be model.hidden / model.heads ({model.hidden} / {model.heads}) for llama.cpp's qwen2moe"
        raise ConfigError("model.head_dim", model.width_of_head, problem, SERVERS)
    return name


def _without_architecture(model: ModelConfig) -> ConfigError:
    moe = model.moe
    if moe.shortcut:
        problem = "llama.cpp adds the output of experts at once"
        return ConfigError("model.moe.shortcut", True, problem, "run it with python -m dynmoe.generate")
    if model.moe_layers and model.router.budgets:
        return ConfigError("model.router.budgets", model.router.budgets, "llama.cpp has one number of experts", SERVERS)
    if model.moe_layers and not isinstance(model.router, TopK):
        problem = "llama.cpp gives every token the same number of experts"
        return ConfigError("model.router.kind", model.router.kind, problem, SERVERS)
    field = own_field(model.router) if model.moe_layers and isinstance(model.router, TopK) else None
    if field is not None:
        problem = "has no counterpart in llama.cpp's architectures with our attention"
        return ConfigError(f"model.router.{field}", getattr(model.router, field), problem, SERVERS)
    if len(set(moe.experts_by_layer)) > 1:
        problem = "llama.cpp requires the same number of experts in every layer"
        return ConfigError("model.moe.experts_by_layer", moe.experts_by_layer, problem, SERVERS)
    experts = f"model.moe.moe_layer_freq={moe.moe_layer_freq}, shared_hidden={moe.shared_hidden}"
    others = experts if model.moe_layers else "no experts"
    return ConfigError("model.qk_norm", model.qk_norm, f"llama.cpp has no architecture for it with {others}", SERVERS)


def describe(model: ModelConfig, name: str, vocab_size: int, longest: int) -> dict[str, int | float]:
    """The metadata fields of a file, without the architecture's name as prefix.

    Args:
        model: configuration of the model.
        name: the architecture, as llama.cpp calls it.
        vocab_size: number of embedding rows in the file.
        longest: maximum sequence length, in tokens.
    """
    moe = model.moe
    fields: dict[str, int | float] = {
        "vocab_size": vocab_size,
        "context_length": longest,
        "block_count": model.layers,
        "embedding_length": model.hidden,
        "feed_forward_length": moe.expert_hidden if model.moe_layers else model.ffn_hidden,
        "attention.head_count": model.heads,
        "attention.head_count_kv": model.heads if name in _WITHOUT_GROUPS else model.kv_heads,
        "attention.key_length": model.width_of_head,
        "attention.value_length": model.width_of_head,
        "attention.layer_norm_rms_epsilon": model.norm_eps,
        "rope.dimension_count": model.width_of_head,
        "rope.freq_base": model.rope_theta,
    }
    if model.moe_layers:
        assert isinstance(model.router, TopK)
        fields |= {"expert_count": model.max_experts_per_layer, "expert_used_count": model.router.k}
        fields["expert_feed_forward_length"] = moe.expert_hidden
    if name in ("qwen2moe", "granitemoe"):
        fields["expert_shared_feed_forward_length"] = moe.shared_hidden or moe.expert_hidden
    if name == "granitemoe":
        fields["logit_scale"] = 1.0
    elif name == "dots1":
        fields |= {"leading_dense_block_count": 0, "expert_shared_count": 1, "expert_gating_func": _SOFTMAX}
        fields["expert_weights_scale"] = 1.0
    return fields


def tensors(
    model: ModelConfig, name: str, weights: Mapping[str, Tensor], vocab_size: int
) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a file by name, in fp32. GGUF numbers axes in reverse: our last axis is its first.

    Args:
        model: configuration of the model.
        name: the architecture, as llama.cpp calls it.
        weights: weights of our decoder, by name.
        vocab_size: number of embedding rows that represent pieces; further rows are omitted.
    """
    embedding_VD = weights["w_embed_VD"][:vocab_size]
    yield "token_embd.weight", embedding_VD
    for layer in range(model.layers):
        prefix = f"layers.{layer}."
        ours = {key.removeprefix(prefix): own for key, own in weights.items() if key.startswith(prefix)}
        for part, tensor in _layer(model, name, ours):
            yield f"blk.{layer}.{part}.weight", tensor
    yield "output_norm.weight", weights["norm.weight"]
    if not model.tie_embeddings:
        yield "output.weight", weights["w_out_VD"][:vocab_size]
    elif name in _MUST_NOT_TIE:
        yield "output.weight", embedding_VD


def _layer(model: ModelConfig, name: str, ours: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    yield "attn_norm", ours["attention_norm.weight"]
    yield from _attention(model, name, ours)
    yield "ffn_norm", ours["ffn_norm.weight"]
    if not model.moe_layers:
        yield from _swiglu(ours["ffn.w_up_HD"], ours["ffn.w_down_DF"], "")
        return
    yield "ffn_gate_inp", ours["moe.router.weight_ED"]
    yield from _swiglu(ours["moe.experts.w_up_EHD"], ours["moe.experts.w_down_EDF"], "_exps")
    if model.moe.shared_hidden or name in _MUST_SHARE:
        yield from _shared_expert(model, name, ours)


def _attention(model: ModelConfig, name: str, ours: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    width = model.width_of_head
    rows = [count * width for count in (model.heads, model.kv_heads, model.kv_heads)]
    query_ID, key_ID, value_ID = ours["attention.w_qkv"].split(rows)
    norms = {part: ours[f"attention.{part}.weight"] for part in ("q_norm", "k_norm") if model.qk_norm is not None}
    if name in _PAIRED:
        query_ID, key_ID = (_in_pairs(rows_ID, width) for rows_ID in (query_ID, key_ID))
    elif name in _WITHOUT_GROUPS:
        key_ID, value_ID = (_for_every_head(rows_ID, model) for rows_ID in (key_ID, value_ID))
        if model.qk_norm == "projection":
            norms["k_norm"] = _for_every_head(norms["k_norm"], model)
    yield from (("attn_q", query_ID), ("attn_k", key_ID), ("attn_v", value_ID))
    yield "attn_output", ours["attention.w_out"]
    for part, weight in norms.items():
        yield f"attn_{part}", weight


def _in_pairs(projection_ID: Tensor, width: int) -> Tensor:
    """Reorders the rows of each head so that the two rows that are rotated together are neighbors."""
    return projection_ID.unflatten(0, (-1, 2, width // 2)).transpose(1, 2).flatten(0, 2)


def _for_every_head(own: Tensor, model: ModelConfig) -> Tensor:
    """Repeats the rows of each key-value head for every query head; a norm over all heads stays the same."""
    groups = own.unflatten(0, (model.kv_heads, model.width_of_head))
    return groups.repeat_interleave(model.heads // model.kv_heads, dim=0).flatten(0, 1)


def _swiglu(up: Tensor, down: Tensor, which: str) -> Iterator[tuple[str, Tensor]]:
    """Gate, up and down projection of a feed-forward layer, from [2F, D] and [D, F], or of experts, stacked over E."""
    gate, up = up.chunk(2, dim=-2)
    yield from ((f"ffn_gate{which}", gate), (f"ffn_up{which}", up), (f"ffn_down{which}", down))


def _shared_expert(model: ModelConfig, name: str, ours: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The shared expert, or one of zeros.

    Qwen2-MoE multiplies it by the sigmoid of a gate. Without a gate of ours, that has to be one half. llama.cpp
    computes that sigmoid as silu(x) / x, which is NaN for x = 0. The gate therefore has two tiny weights of different
    magnitude: x is almost zero, and not exactly zero even if one of the two inputs is.
    """
    width = model.moe.expert_hidden
    up_HD = ours.get("moe.shared.w_up_HD", torch.zeros(2 * width, model.hidden))
    down_DF = ours.get("moe.shared.w_down_DF", torch.zeros(model.hidden, width))
    if model.moe.shared_gate:
        yield "ffn_gate_inp_shexp", ours["moe.shared.w_gate_1D"][0]
    elif name == "qwen2moe":
        gate_D = torch.zeros(model.hidden)
        gate_D[:2] = torch.tensor(_NEARLY_ZERO)
        yield "ffn_gate_inp_shexp", gate_D
        down_DF = 2 * down_DF
    yield from _swiglu(up_HD, down_DF, "_shexp")
