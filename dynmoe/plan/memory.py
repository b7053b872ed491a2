"""Analytical estimate of the memory of one rank.

Static memory follows from what the engines store per parameter. Temporary memory was fitted to measurements of both
engines (megatron-core 0.16.1, deepspeed 0.19.8; ``tests/plan`` repeats them). It peaks either in the backward pass of a
layer (``activations.py``), or when gradients are reduced and the optimizer steps.
"""

from __future__ import annotations

from dataclasses import dataclass

from dynmoe.config.constants import DEEPSPEED_BUCKET, DEEPSPEED_PREFETCH
from dynmoe.plan.activations import activation_bytes, recomputed_bytes
from dynmoe.plan.layout import Layout

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
    embeddings = layout.size.embedding * (1 if layout.config.model.tie_embeddings else 2)
    held = _EngineMemory(
        parts, layout.element, layout.config.deepspeed.zero_stage, layout.accumulation > 1, largest, embeddings
    )
    kept, gradients, at_backward, at_step = held.megatron() if layout.config.engine == "megatron" else held.deepspeed()
    activations, transient = activation_bytes(layout, stage, experts_per_token, device)
    # The larger of both peaks; ``temporary`` is the part in addition to activations.
    peak = max(activations + transient + at_backward, at_step + recomputed_bytes(layout, stage, experts_per_token))
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
        embeddings: number of parameters of the embedding and output projection, which ZeRO 3 gathers for a whole pass.
    """

    parts: list[_Part]
    element: int
    stage: int
    accumulates: bool
    largest_layer: int
    embeddings: int

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
        gathered = self.element * min(self._whole, self.embeddings + DEEPSPEED_PREFETCH + self.largest_layer)
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
