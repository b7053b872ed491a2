"""Which matrices the weights of the model hold."""

from __future__ import annotations

from collections.abc import Iterator

from dynmoe.config import ModelConfig


def rows_of_matrices(model: ModelConfig, name: str, rows: int) -> tuple[int, ...]:
    """Numbers of rows of the matrices that a weight, or one expert's, holds one below the other.

    Args:
        model: configuration of the model.
        name: of the weight in :class:`dynmoe.model.Decoder`.
        rows: of the whole weight.
    """
    last = name.rpartition(".")[2]
    if last == "w_qkv":
        size = model.width_of_head
        return model.heads * size, model.kv_heads * size, model.kv_heads * size
    if last.startswith("w_up_"):  # gate and up projection
        return rows // 2, rows // 2
    return (rows,)


def matrices_of_layer(model: ModelConfig, layer: int, experts: bool) -> Iterator[tuple[int, int, int]]:
    """Rows, columns and number of the matrices of a decoder layer: of its routed experts, or all others but the router.

    Args:
        model: configuration of the model.
        layer: index of the layer.
        experts: which of both.
    """
    hidden = model.hidden
    if experts:
        if model.is_moe_layer(layer):
            yield from _swiglu(hidden, model.moe.expert_hidden, model.experts_of(layer))
        return
    latent = model.latent
    if latent.kv_lora_rank is None:
        yield model.heads * model.width_of_head, hidden, 1
        yield model.kv_heads * model.width_of_head, hidden, 2
    else:
        if latent.q_lora_rank is not None:
            yield latent.q_lora_rank, hidden, 1
        yield model.heads * latent.width_of_key, latent.q_lora_rank or hidden, 1
        yield latent.kv_lora_rank + latent.qk_rope_head_dim, hidden, 1
        yield model.heads * (latent.qk_nope_head_dim + latent.v_head_dim), latent.kv_lora_rank, 1
    yield hidden, model.heads * model.width_of_value, 1
    if layer >= model.layers:  # joins the two inputs of a layer that predicts a further token
        yield hidden, 2 * hidden, 1
    if model.has_feed_forward(layer):
        yield from _swiglu(hidden, model.ffn_hidden, 1)
    if model.is_moe_layer(layer) and model.moe.shared_hidden:
        yield from _swiglu(hidden, model.moe.shared_hidden, 1)
        if model.moe.shared_gate:
            yield 1, hidden, 1


def _swiglu(hidden: int, width: int, count: int) -> Iterator[tuple[int, int, int]]:
    yield width, hidden, 2 * count
    yield hidden, width, count
