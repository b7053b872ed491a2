"""Analytical estimate of the memory of one rank.

Static memory follows from what the engines store per parameter. Temporary memory was fitted to measurements of both
engines (megatron-core 0.16.1, deepspeed 0.19.8; ``tests/plan`` repeats them). It peaks either when the backward pass of
the last layer begins, or when gradients are reduced and the optimizer steps.
"""

from __future__ import annotations

from dataclasses import dataclass

from dynmoe.config import ModelConfig
from dynmoe.config.constants import CHUNK_LOGITS, DEEPSPEED_BUCKET, DEEPSPEED_PREFETCH
from dynmoe.plan.layout import Layout

# Bytes per logit in the cross-entropy, including temporaries.
_LOGIT_BYTES = 12
# Copies of the matrices that a rank orthogonalizes: sent, received, joined, and within the iteration.
_MUON_COPIES = 6


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank: three static parts, and the peak that a step adds to them."""

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    temporary: float

    @property
    def static(self) -> float:
        return self.parameters + self.gradients + self.optimizer

    @property
    def total(self) -> float:
        return self.static + self.activations + self.temporary


def memory_per_rank(layout: Layout, experts_per_token: float, device: str = "cuda") -> Memory:
    """Memory of the rank that needs the most.

    Args:
        layout: layout of the run.
        experts_per_token: mean over the tokens of a rank. The load of the experts is assumed to be even; an uneven load
            needs more memory.
        device: ``cuda`` or ``cpu``.
    """
    stages = range(layout.config.parallel.pipeline)
    memories = [memory_of_stage(layout, stage, experts_per_token, device) for stage in stages]
    return max(memories, key=lambda memory: memory.total)


def memory_of_stage(layout: Layout, stage: int, experts_per_token: float, device: str = "cuda") -> Memory:
    """Memory of a rank of a pipeline stage; see :func:`memory_per_rank` for the arguments."""
    dense = layout.dense_parameters(stage)
    experts = layout.expert_parameters(stage)
    by_muon = layout.config.optimizer.kind == "muon"
    parts = [
        _Part(dense, layout.data_parallel, layout.dense_matrices(stage) if by_muon else 0),
        _Part(experts, layout.expert_data_parallel, experts if by_muon else 0),
    ]
    largest = max(layout.layer_parameters(layer) for layer in layout.layers(stage))
    held = _EngineMemory(parts, layout.element, layout.config.deepspeed.zero_stage, layout.accumulation > 1, largest)
    kept, gradients, at_backward, at_step = held.megatron() if layout.config.engine == "megatron" else held.deepspeed()
    activations, transient = _activations(layout, stage, experts_per_token, device)
    # The larger of both peaks; ``temporary`` is the part in addition to activations.
    peak = max(activations + transient + at_backward, at_step + _recomputed(layout, stage, experts_per_token))
    weights = held.weights if layout.config.engine == "deepspeed" else (dense + experts) * layout.element
    return Memory(weights, gradients, kept, activations, peak - activations)


@dataclass(frozen=True)
class _Part:
    """Parameters of a rank: their number, the ranks that may share their optimizer state, and how many Muon updates."""

    count: int
    ranks: int
    matrices: int


@dataclass(frozen=True)
class _EngineMemory:
    """Memory of an engine for the parameters of a rank, besides the weights.

    Both methods return bytes: optimizer state, persistent gradients, and temporary memory at the beginning of the last
    layer's backward pass and in the optimizer step.

    Attributes:
        parts: the parameters.
        element: bytes per weight.
        stage: ZeRO stage.
        accumulates: whether a step has several micro-batches.
        largest_layer: number of parameters of the largest layer, which ZeRO 3 gathers.
    """

    parts: list[_Part]
    element: int
    stage: int
    accumulates: bool
    largest_layer: int

    @property
    def weights(self) -> float:
        """Bytes of the weights that a rank keeps under DeepSpeed."""
        return self.element * (self._shard if self.stage == 3 else self._whole)

    @property
    def _whole(self) -> int:
        return sum(part.count for part in self.parts)

    @property
    def _shard(self) -> float:
        return sum(part.count / part.ranks for part in self.parts)

    def megatron(self) -> tuple[float, float, float, float]:
        # fp32 masters share memory with fp32 weights; gradients have a persistent fp32 buffer.
        per_parameter = 8.0 if self.element == 4 else 12.0
        state = per_parameter * self._shard - self._second_moments(sharded=True)
        at_step = max(4.0 * max(part.count for part in self.parts), self._orthogonalization(sharded=True))
        return state, 4.0 * self._whole, 0.0, at_step

    def _second_moments(self, sharded: bool) -> float:
        """Bytes that Muon saves."""
        return sum(4.0 * part.matrices / (part.ranks if sharded else 1) for part in self.parts)

    def _orthogonalization(self, sharded: bool) -> float:
        """Temporary bytes of Muon in the larger part: updates in fp32, and copies of what a rank orthogonalizes."""
        return max(
            4.0 * part.matrices / (part.ranks if sharded else 1)
            + _MUON_COPIES * self.element * part.matrices / part.ranks
            for part in self.parts
        )

    def deepspeed(self) -> tuple[float, float, float, float]:
        if self.stage == 3:
            return self._zero3()
        state, gradients, at_backward, at_step = self._deepspeed_with_adam()
        sharded = self.stage > 0
        # The gradients of the step are still there, but not the buffers of their reduction.
        whole = 4.0 * (self._shard if self.stage == 2 else self._whole)
        at_muon = max(0.0, whole - gradients) + self._orthogonalization(sharded)
        return state - self._second_moments(sharded), gradients, at_backward, max(at_step, at_muon)

    def _zero3(self) -> tuple[float, float, float, float]:
        """Keeps the buffer in which it reduces gradients; gathers weights ahead of the layers that need them."""
        gathered = self.element * min(self._whole, DEEPSPEED_PREFETCH + self.largest_layer)
        bucket = self.element * min(self._whole, DEEPSPEED_BUCKET)
        copied = max(4.0 * part.count / part.ranks for part in self.parts)
        return 12.0 * self._shard, 4.0 * self._shard + bucket, gathered, copied

    def _deepspeed_with_adam(self) -> tuple[float, float, float, float]:
        whole = self._whole
        shard = self._shard
        element = self.element
        largest, ranks = max((part.count, part.ranks) for part in self.parts)
        bucket = element * min(whole, DEEPSPEED_BUCKET)
        flat = element * min(largest, DEEPSPEED_BUCKET)
        if self.stage == 0:
            state = (8.0 if element == 4 else 12.0) * whole
            earlier = element * whole if self.accumulates else 0.0
            # fp32 gradients are flattened for the reduction; bf16 gradients are copied to fp32.
            return state, 0.0, earlier, element * whole + (flat if element == 4 else 4.0 * whole)
        state = 12.0 * shard
        if element == 4 and self.stage == 1:
            again = 4.0 * shard if self.accumulates else 0.0
            return state, 4.0 * whole if self.accumulates else 0.0, bucket, bucket + 4.0 * whole + again
        if element == 4:
            return state, 4.0 * shard if self.accumulates else 0.0, bucket, bucket + max(flat, 4.0 * shard)
        if self.stage == 1:
            # Unsharded fp32 gradients; the step copies the shard of the largest part.
            return state, 4.0 * whole, 0.0, 2.0 * whole + 12.0 * largest / ranks
        averaged = 4.0 * shard  # in fp32; with accumulation it exists from the first micro-batch on
        if self.accumulates:
            return state, averaged, bucket, bucket + flat
        return state, 0.0, bucket, bucket + flat + averaged


def _activations(layout: Layout, stage: int, experts_per_token: float, device: str) -> tuple[float, float]:
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


def _recomputed(layout: Layout, stage: int, experts_per_token: float) -> float:
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
