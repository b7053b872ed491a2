"""Activations of a rank and what a backward pass adds to them, fitted to measurements as in ``memory.py``."""

from __future__ import annotations

from dynmoe.config import ModelConfig
from dynmoe.config.constants import CHUNK_LOGITS
from dynmoe.plan.layout import Layout

# Bytes per logit in the cross-entropy, including temporaries.
_LOGIT_BYTES = 12


def activation_bytes(layout: Layout, stage: int, experts_per_token: float, device: str) -> tuple[float, float]:
    """Bytes of activations that are stored when a backward pass begins, and what it adds to them at its peak.

    It may peak in any layer. By then the layers behind it, and the head, have released their activations.
    """
    config = layout.config
    parallel = config.parallel
    layers = layout.layers(stage)
    whole = {layer: _layer(layout, layer, experts_per_token) for layer in layers}
    recomputes = config.train.recompute == "full"
    inputs = float(layout.tokens * config.model.hidden * layout.element)
    stored = dict.fromkeys(layers, inputs) if recomputes else whole
    # 1F1B: the number of micro-batches in flight is that of the stages from this one on. Interleaving has more
    # (Megatron's warm-up of 2 (p - s - 1) + (v - 1) p chunks, and the current one).
    in_flight = float(parallel.pipeline - stage)
    if parallel.virtual_pipeline > 1:
        in_flight = parallel.pipeline + (parallel.pipeline - 2 * stage - 1) / parallel.virtual_pipeline
    gradient, head = _head(layout, device) if stage == parallel.pipeline - 1 else (0.0, 0.0)
    kept = sum(stored.values()) * min(in_flight, layout.accumulation) + gradient + head
    added = released = 0.0
    for layer in reversed(layers):
        again = whole[layer] if recomputes else 0.0
        added = max(added, again + _transient(layout, layer, experts_per_token) - released)
        released += stored[layer] + (head if layer == layers[-1] else 0.0)
    return kept, added


def _transient(layout: Layout, layer: int, experts_per_token: float) -> float:
    """Temporary bytes of the backward pass of a layer's feed-forward: gradients of its rows and of its weights."""
    config = layout.config
    model = config.model
    hidden = model.hidden
    element = layout.element
    most = 0.0
    if model.is_moe_layer(layer):
        rows = experts_per_token * layout.tokens
        experts = layout.size.layer(layer).experts / config.parallel.expert
        most = (rows * (2 * hidden + model.moe.expert_hidden) + experts) * element
        if config.train.moe_backend == "mxfp8":
            # While the up projections, two thirds, are quantized: scaled in their own type, and as bytes. From the
            # code, not measured.
            most += 2 / 3 * experts * (element + 1)
    if model.has_feed_forward(layer):
        weights = 2 * hidden * model.ffn_hidden / config.parallel.tensor
        most = max(most, (layout.tokens * (hidden + 3 * model.ffn_hidden) + weights) * element)
    return most


def _attention(model: ModelConfig, element: int) -> int:
    """Bytes per token that attention stores between its projections. Ranks that share heads have more tokens."""
    width = model.width_of_head
    heads = model.heads + model.kv_heads
    kept = 2 * heads * width * element + 4 * model.heads  # queries, keys, values and output; softmax statistics
    if model.qk_norm is not None:  # inputs of the norms, and their factors
        kept += heads * (width * element + 4)
    latent = model.latent
    if latent.kv_lora_rank is not None:
        if latent.v_head_dim < width:  # the output without the padding of values
            kept += model.heads * latent.v_head_dim * element
        # Latents before and after their norms, the shared key before and after rotation, and factors of the norms.
        kept += 2 * (latent.kv_lora_rank + (latent.q_lora_rank or 0) + latent.qk_rope_head_dim) * element + 8
    return kept


def _layer(layout: Layout, layer: int, experts_per_token: float) -> float:
    """Bytes of activations that one decoder layer stores per micro-batch."""
    model = layout.config.model
    parallel = layout.config.parallel
    element = layout.element
    tokens = layout.tokens
    hidden = model.hidden
    kept: float = tokens * (4 * hidden * element + _attention(model, element))  # residual streams, outputs of norms
    if layer >= model.layers:  # embeddings, both inputs normalized and joined, and before and after the final norm
        kept += tokens * 6 * hidden * element
    if parallel.tensor > 1:  # output of the norm, gathered for the projections
        kept += tokens * hidden * element * (parallel.tensor - 1)
    if model.has_feed_forward(layer):
        kept += tokens * 4 * model.ffn_hidden * element  # split over the same ranks as sequences
    if not model.is_moe_layer(layer):
        return kept
    experts = model.experts_of(layer)
    moe = model.moe
    ranks = parallel.expert
    kept += tokens * experts * 16  # fp32 logits, scores, gates, and the map
    kept += tokens * experts_per_token * (2 * moe.expert_hidden * element + 32)  # up projections, indices
    kept += tokens * 4 * moe.shared_hidden * element
    if element == 2:
        kept += tokens * hidden * 4  # the router's input in fp32
    if ranks > 1:
        kept += tokens * ranks_reached(model, layer, experts_per_token, ranks) * hidden * element  # received tokens
    return kept


def recomputed_bytes(layout: Layout, stage: int, experts_per_token: float) -> float:
    """Bytes of one recomputed layer. The first layer is recomputed when all gradients already exist."""
    if layout.config.train.recompute != "full":
        return 0.0
    return max(_layer(layout, layer, experts_per_token) for layer in layout.layers(stage))


def _head(layout: Layout, device: str) -> tuple[float, float]:
    """Bytes of the head, of all depths of prediction: of the gradient of the output projection, and of all else.

    All else is the final norm, the logits and the cross-entropy.
    """
    tokens = layout.tokens
    depths = 1 + layout.config.model.mtp.layers
    states = depths * tokens * 3 * layout.config.model.hidden * layout.element
    if layout.config.engine == "megatron":  # all logits of the micro-batch, also in fp32
        whole = tokens * layout.config.parallel.tensor
        logits = whole * layout.vocab_size / layout.config.parallel.tensor
        return 0.0, states + depths * logits * (layout.element + 4)
    logits = min(CHUNK_LOGITS[device], tokens * layout.vocab_size)
    return depths * layout.size.embedding * 4.0, states + logits * _LOGIT_BYTES


def ranks_reached(model: ModelConfig, layer: int, experts_per_token: float, ranks: int) -> float:
    """Expected number of expert-parallel ranks to which a token is sent in an MoE layer.

    Groups of experts limit it: exactly if each has ranks of its own, by their number if each is on one rank.
    """
    router = model.router
    experts = model.experts_of(layer)
    if ranks % router.n_group == 0:
        usable = ranks * router.topk_group // router.n_group
        return ranks_per_token(experts_per_token, router.usable_experts(experts), usable)
    reached = ranks_per_token(experts_per_token, experts, ranks)
    return min(reached, router.topk_group) if router.n_group % ranks == 0 else reached


def ranks_per_token(experts_per_token: float, experts: int, ranks: int) -> float:
    """Expected number of expert-parallel ranks that hold a token's experts, drawn uniformly without replacement.

    It is the number of ranks times the probability that a rank holds at least one of them; values for fractional
    numbers of experts are interpolated linearly.
    """
    per_rank = experts // ranks

    def of(count: int) -> float:
        missed = 1.0
        for drawn in range(count):
            missed *= max(0, experts - per_rank - drawn) / (experts - drawn)
        return ranks * (1.0 - missed)

    low = min(int(experts_per_token), experts)
    share = min(experts_per_token, experts) - low
    return of(low) + (share * (of(low + 1) - of(low)) if share else 0.0)
