"""Maps parameters of a Megatron model to weights of the plain model (:mod:`dynmoe.model`).

The plain model defines names and layout of the weights. Megatron groups query, key and value rows by key-value head
and shards most matrices over tensor-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from dynmoe.config import ModelConfig
from dynmoe.config.latent import LatentConfig
from dynmoe.engines.megatron.versions import final_norm
from dynmoe.model.decoder import initial_embedding, make_attention
from dynmoe.model.rotary import halves, neighbours
from dynmoe.moe import MoELayer
from dynmoe.moe.experts import SwiGLU


@dataclass(frozen=True)
class Layout:
    """Layout of a weight over tensor-parallel ranks.

    Attributes:
        split: converts a weight of the plain model to its shards on ``n`` tensor-parallel ranks.
        join: converts these shards back to the weight.
        replicated: whether every rank has the whole weight.
    """

    split: Callable[[Tensor, int], list[Tensor]]
    join: Callable[[list[Tensor]], Tensor]
    replicated: bool = False


def _shard(dim: int) -> Layout:
    """Shards a dimension into consecutive blocks."""
    return Layout(lambda whole, n: list(whole.chunk(n, dim)), lambda parts: torch.cat(parts, dim))


def _gate_and_up() -> Layout:
    """Gives every rank a block of gate rows, followed by a block of up rows."""

    def split(whole: Tensor, n: int) -> list[Tensor]:
        gate, up = whole.chunk(2)
        return [torch.cat(pair) for pair in zip(gate.chunk(n), up.chunk(n), strict=True)]

    def join(parts: list[Tensor]) -> Tensor:
        pairs = [part.chunk(2) for part in parts]
        return torch.cat([gate for gate, _ in pairs] + [up for _, up in pairs])

    return Layout(split, join)


def _query_key_value(model: ModelConfig) -> Layout:
    """Groups rows of queries, key and value by key-value head, and shards these heads."""
    groups = model.kv_heads
    size = model.width_of_head
    queries = model.heads // groups * size

    def split(whole: Tensor, n: int) -> list[Tensor]:
        q, k, v = whole.split([groups * queries, groups * size, groups * size])
        grouped = torch.cat([part.view(groups, -1, *whole.shape[1:]) for part in (q, k, v)], dim=1)
        return list(grouped.flatten(0, 1).chunk(n))

    def join(parts: list[Tensor]) -> Tensor:
        whole = torch.cat(parts)
        grouped = whole.view(groups, -1, *whole.shape[1:])
        return torch.cat([part.flatten(0, 1) for part in grouped.split([queries, size, size], dim=1)])

    return Layout(split, join)


_REPLICATED = Layout(lambda whole, n: [whole] * n, lambda parts: parts[0], replicated=True)


def _interleaved(latent: LatentConfig, blocks: int, layout: Layout) -> Layout:
    """Puts rows that are rotated together next to each other, as Megatron expects them in latent attention.

    Args:
        latent: its ``qk_rope_head_dim`` last rows of each block are rotated.
        blocks: number of equal blocks of rows, such as heads.
        layout: how the rows are then spread over the ranks.
    """
    rotated = latent.qk_rope_head_dim
    return Layout(
        lambda whole, n: layout.split(neighbours(whole, blocks, rotated), n),
        lambda parts: halves(layout.join(parts), blocks, rotated),
        layout.replicated,
    )


@dataclass(frozen=True)
class Weight:
    """A parameter of this rank with its name in the plain model and its layout."""

    name: str
    parameter: nn.Parameter
    layout: Layout


def weights(chunk: MegatronModule, model: ModelConfig) -> Iterator[Weight]:
    """Every parameter of a model chunk, except a copy of an embedding that another rank owns."""
    if chunk.pre_process:
        yield Weight("w_embed_VD", chunk.embedding.word_embeddings.weight, _shard(0))
    for layer in transformer_layers(chunk):
        name = f"layers.{layer.layer_number - 1}"
        yield Weight(f"{name}.attention_norm.weight", layer.input_layernorm.weight, _REPLICATED)
        of_attention = _latent_attention if model.latent.enabled else _attention
        yield from of_attention(layer.self_attention, f"{name}.attention", model)
        yield Weight(f"{name}.ffn_norm.weight", layer.pre_mlp_layernorm.weight, _REPLICATED)
        if (moe := moe_layer(layer)) is not None:
            for suffix, parameter in moe.named_parameters():
                yield Weight(f"{name}.moe.{suffix}", parameter, _REPLICATED)
        if layer.mlp is not moe:
            yield Weight(f"{name}.ffn.w_up_HD", layer.mlp.linear_fc1.weight, _gate_and_up())
            yield Weight(f"{name}.ffn.w_down_DF", layer.mlp.linear_fc2.weight, _shard(1))
    if chunk.prediction is not None:
        for own in chunk.prediction.layers:
            name = f"layers.{own.layer.layer_number - 1}"
            for suffix, parameter in own.join.named_parameters():
                yield Weight(f"{name}.join.{suffix}", parameter, _REPLICATED)
            yield Weight(f"{name}.norm.weight", own.norm.weight, _REPLICATED)
    if chunk.post_process:
        yield Weight("norm.weight", final_norm(chunk.decoder).weight, _REPLICATED)
        if not model.tie_embeddings:
            yield Weight("w_out_VD", chunk.output_layer.weight, _shard(0))


def _attention(attention: MegatronModule, name: str, model: ModelConfig) -> Iterator[Weight]:
    yield Weight(f"{name}.w_qkv", attention.linear_qkv.weight, _query_key_value(model))
    yield Weight(f"{name}.w_out", attention.linear_proj.weight, _shard(1))
    if model.attention_bias is not None:
        yield Weight(f"{name}.b_qkv", attention.linear_qkv.bias, _query_key_value(model))
    if model.attention_bias == "all":
        yield Weight(f"{name}.b_out", attention.linear_proj.bias, _REPLICATED)
    if model.qk_norm is not None:
        layout = _REPLICATED if model.qk_norm == "head" else _shard(0)
        yield Weight(f"{name}.q_norm.weight", attention.q_layernorm.weight, layout)
        yield Weight(f"{name}.k_norm.weight", attention.k_layernorm.weight, layout)


def _latent_attention(attention: MegatronModule, name: str, model: ModelConfig) -> Iterator[Weight]:
    queries = _interleaved(model.latent, model.heads, _shard(0))
    if model.latent.q_lora_rank is None:
        yield Weight(f"{name}.w_q", attention.linear_q_proj.weight, queries)
    else:
        yield Weight(f"{name}.w_q_down", attention.linear_q_down_proj.weight, _REPLICATED)
        yield Weight(f"{name}.q_norm.weight", attention.q_layernorm.weight, _REPLICATED)
        yield Weight(f"{name}.w_q_up", attention.linear_q_up_proj.weight, queries)
    layout = _interleaved(model.latent, 1, _REPLICATED)
    yield Weight(f"{name}.w_kv_down", attention.linear_kv_down_proj.weight, layout)
    yield Weight(f"{name}.kv_norm.weight", attention.kv_layernorm.weight, _REPLICATED)
    yield Weight(f"{name}.w_kv_up", attention.linear_kv_up_proj.weight, _shard(0))
    yield Weight(f"{name}.w_out", attention.linear_proj.weight, _shard(1))


def moe_layer(layer: MegatronModule) -> MoELayer | None:
    """The MoE layer in, or beside, the feed-forward of a layer."""
    return next((part for part in layer.modules() if isinstance(part, MoELayer)), None)


def transformer_layers(chunk: MegatronModule) -> list[MegatronModule]:
    """The decoder layers of a model chunk, in order, with those that predict further tokens."""
    further = [] if chunk.prediction is None else [own.layer for own in chunk.prediction.layers]
    return [*chunk.decoder.layers, *further]


def moe_layers(chunk: MegatronModule) -> list[MoELayer]:
    """The MoE layers of a model chunk, in order."""
    return [moe for layer in transformer_layers(chunk) if (moe := moe_layer(layer)) is not None]


@torch.no_grad()
def initialize(
    chunk: MegatronModule, model: ModelConfig, vocab_size: int, seed: int, tensor_rank: int, tensor: int
) -> None:
    """Initializes a model chunk like the plain model; MoE layers, norms and joined inputs already are."""
    by_name = {weight.name: weight for weight in weights(chunk, model)}
    for weight in by_name.values():
        if not weight.layout.replicated:
            # Gradient norms need this flag of sharded weights; Megatron sets it only when it initializes them itself.
            weight.parameter.tensor_model_parallel = True  # type: ignore[attr-defined]

    def fill(name: str, plain: Tensor) -> None:
        weight = by_name[name]
        weight.parameter.copy_(weight.layout.split(plain, tensor)[tensor_rank])

    if chunk.pre_process:
        fill("w_embed_VD", initial_embedding(model, vocab_size, seed, "w_embed"))
    elif chunk.post_process and model.tie_embeddings:
        plain = initial_embedding(model, vocab_size, seed, "w_embed")
        chunk.output_layer.weight.copy_(_shard(0).split(plain, tensor)[tensor_rank])
    elif chunk.prediction is not None:
        plain = initial_embedding(model, vocab_size, seed, "w_embed")
        copy = chunk.prediction.embedding.word_embeddings.weight
        copy.copy_(_shard(0).split(plain, tensor)[tensor_rank])
    if "w_out_VD" in by_name:
        fill("w_out_VD", initial_embedding(model, vocab_size, seed, "w_out"))
    for layer in transformer_layers(chunk):
        number = layer.layer_number - 1
        name = f"layers.{number}"
        parts: dict[str, nn.Module] = {"attention": make_attention(model, number, seed)}
        if model.has_feed_forward(number):
            parts["ffn"] = SwiGLU(model, model.ffn_hidden, seed, f"{name}.ffn")
        for part, module in parts.items():
            for parameter_name, parameter in module.named_parameters():
                fill(f"{name}.{part}.{parameter_name}", parameter)
