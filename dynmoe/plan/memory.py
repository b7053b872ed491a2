"""Memory of one rank, from numbers alone.

Static parts follow from what the engines keep of each parameter. What comes and goes within a step was measured on both
engines (megatron-core 0.16.1, deepspeed 0.19.8; ``tests/plan`` compares again): the largest of what there is when the
last layer's backward pass begins, and what there is when gradients are reduced and the optimizer steps.
"""

from __future__ import annotations

from dataclasses import dataclass

from dynmoe.config.constants import CHUNK_LOGITS, DEEPSPEED_BUCKET
from dynmoe.plan.layout import Layout

# Bytes per logit in the cross-entropy, including temporaries.
_LOGIT_BYTES = 12


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank: the three that stay between steps, and the most that a step adds."""

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    temporary: float

    @property
    def total(self) -> float:
        return self.parameters + self.gradients + self.optimizer + self.activations + self.temporary


def memory_per_rank(layout: Layout, experts_per_token: float, device: str = "cuda") -> Memory:
    """Memory of the rank that needs most.

    Args:
        layout: of the run.
        experts_per_token: mean over a rank's tokens, and on the rank of the experts over what it receives: skewed loads
            need more there.
        device: ``cuda`` or ``cpu``.
    """
    stages = range(layout.config.parallel.pipeline)
    memories = [_memory(layout, stage, experts_per_token, device) for stage in stages]
    return max(memories, key=lambda memory: memory.total)


def _memory(layout: Layout, stage: int, experts_per_token: float, device: str) -> Memory:
    dense, experts = layout.dense_parameters(stage), layout.expert_parameters(stage)
    parts = [(dense, layout.data_parallel), (experts, layout.expert_data_parallel)]
    whole, element = dense + experts, layout.element
    held = _Held(parts, element, layout.config.deepspeed.zero_stage, layout.accumulation > 1)
    kept, gradients, at_backward, at_step = held.megatron() if layout.config.engine == "megatron" else held.deepspeed()
    activations, transient = _activations(layout, stage, experts_per_token, device)
    # Whichever is larger; activations are told apart, the rest is what comes on top of them.
    peak = max(activations + transient + at_backward, at_step + _recomputed(layout, stage, experts_per_token))
    return Memory(whole * element, gradients, kept, activations, peak - activations)


@dataclass(frozen=True)
class _Held:
    """What an engine holds of the parameters of a rank.

    Both methods give bytes of optimizer state and of gradients, which stay; and of what else there is at the beginning
    of the last layer's backward pass, and at the end of a step.

    Attributes:
        parts: numbers of parameters, each with the ranks over which their optimizer may be spread.
        element: bytes of a weight.
        stage: of ZeRO.
        accumulates: whether a step has several passes.
    """

    parts: list[tuple[int, int]]
    element: int
    stage: int
    accumulates: bool

    @property
    def _whole(self) -> int:
        return sum(count for count, _ in self.parts)

    @property
    def _shard(self) -> float:
        return sum(count / ranks for count, ranks in self.parts)

    def megatron(self) -> tuple[float, float, float, float]:
        # Masters are a view of fp32 weights; gradients have a buffer in fp32 for good.
        state = 8.0 if self.element == 4 else 12.0
        return state * self._shard, 4.0 * self._whole, 0.0, 4.0 * max(count for count, _ in self.parts)

    def deepspeed(self) -> tuple[float, float, float, float]:
        whole, shard, element = self._whole, self._shard, self.element
        largest, ranks = max(self.parts)
        bucket, flat = element * min(whole, DEEPSPEED_BUCKET), element * min(largest, DEEPSPEED_BUCKET)
        if self.stage == 0:
            state = (8.0 if element == 4 else 12.0) * whole
            earlier = element * whole if self.accumulates else 0.0
            # In fp32 gradients are joined for the reduction; in bf16 DeepSpeed makes fp32 ones of them.
            return state, 0.0, earlier, element * whole + (flat if element == 4 else 4.0 * whole)
        state = 12.0 * shard
        if element == 4 and self.stage == 1:
            again = 4.0 * shard if self.accumulates else 0.0
            return state, 4.0 * whole if self.accumulates else 0.0, bucket, bucket + 4.0 * whole + again
        if element == 4:
            return state, 4.0 * shard if self.accumulates else 0.0, bucket, bucket + max(flat, 4.0 * shard)
        if self.stage == 1:
            # Gradients in fp32, whole; the step works on copies of the largest part's shard.
            return state, 4.0 * whole, 0.0, 2.0 * whole + 12.0 * largest / ranks
        averaged = 4.0 * shard  # in fp32; what there is of it before the first reduction depends on the passes
        if self.accumulates:
            return state, averaged, bucket, bucket + flat
        return state, 0.0, bucket, bucket + flat + averaged


def _activations(layout: Layout, stage: int, experts_per_token: float, device: str) -> tuple[float, float]:
    """Bytes kept for the backward pass, and what the last layer's own adds on top of them."""
    config, element = layout.config, layout.element
    parallel, hidden = config.parallel, config.model.hidden
    layers, tokens = layout.layers(stage), layout.tokens
    if config.train.recompute == "full":
        each = float(tokens * hidden * element * len(layers))
    else:
        each = sum(_layer(layout, layer, experts_per_token) for layer in layers)
    # 1F1B: a stage has as many passes under way as there are stages from it on; interleaved ones have more (Megatron's
    # warm-up of 2 (p - s - 1) + (v - 1) p parts, and the one that is computed).
    under_way = float(parallel.pipeline - stage)
    if parallel.virtual_pipeline > 1:
        under_way = parallel.pipeline + (parallel.pipeline - 2 * stage - 1) / parallel.virtual_pipeline
    kept = each * min(under_way, layout.accumulation) + _recomputed(layout, stage, experts_per_token)
    last_moe = [layer for layer in layers if config.model.is_moe_layer(layer)]
    transient = 0.0
    if last_moe:
        rows = experts_per_token * tokens
        transient = rows * (2 * hidden + config.model.moe.expert_hidden) * element
        transient += layout.size.layer(last_moe[-1]).experts / parallel.expert * element
    if stage == parallel.pipeline - 1:
        kept += _head(layout, device)
    return kept, transient


def _layer(layout: Layout, layer: int, experts_per_token: float) -> float:
    """Bytes that one decoder layer keeps of a pass."""
    model, parallel, element, tokens = layout.config.model, layout.config.parallel, layout.element, layout.tokens
    # Residual streams, their norms' outputs, queries and what attention gives; keys and values; softmax statistics.
    # Tensor-parallel attention works on whole sequences with its share of the heads.
    hidden, width = model.hidden, model.width_of_head
    heads = model.heads + model.kv_heads
    kept: float = tokens * ((4 * hidden + 2 * heads * width) * element + 4 * model.heads)
    if model.qk_norm is not None:  # queries and keys as they were before, and a factor for each head or for all
        kept += tokens * heads * (width * element + 4)
    if parallel.tensor > 1:  # the norm's output, gathered for the projections
        kept += tokens * hidden * element * (parallel.tensor - 1)
    if not model.is_moe_layer(layer):
        return kept + tokens * 4 * model.ffn_hidden * element  # split over as many ranks as sequences are
    experts, moe = model.experts_of(layer), model.moe
    ranks = parallel.expert
    kept += tokens * experts * 16  # fp32 logits, scores, gates, and the map
    kept += tokens * experts_per_token * (2 * moe.expert_hidden * element + 32)  # up projections, indices
    kept += tokens * 4 * moe.shared_hidden * element
    if element == 2:
        kept += tokens * hidden * 4  # the router's input in fp32
    if ranks > 1:
        kept += tokens * ranks_per_token(experts_per_token, experts, ranks) * hidden * element  # tokens that came
    return kept


def _recomputed(layout: Layout, stage: int, experts_per_token: float) -> float:
    """What the first layer's backward pass needs, when all gradients are there: where it is computed again."""
    if layout.config.train.recompute != "full":
        return 0.0
    return max(_layer(layout, layer, experts_per_token) for layer in layout.layers(stage))


def _head(layout: Layout, device: str) -> float:
    """Final norm, output projection and cross-entropy."""
    model, element, tokens = layout.config.model, layout.element, layout.tokens
    if layout.config.engine == "megatron":  # logits of the whole pass, in fp32 too
        whole = tokens * layout.config.parallel.tensor
        logits = whole * layout.vocab_size / layout.config.parallel.tensor
        return tokens * 3 * model.hidden * element + logits * (element + 4)
    logits = min(CHUNK_LOGITS[device], tokens * layout.vocab_size)
    return tokens * 3 * model.hidden * element + layout.size.embedding * 4 + logits * _LOGIT_BYTES


def ranks_per_token(experts_per_token: float, experts: int, ranks: int) -> float:
    """Mean number of expert-parallel ranks that a token's experts lie on, for experts drawn evenly without repetition.

    One minus the chance that none of them is on a given rank, times the ranks; between whole numbers of experts linear.
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
