"""How a model lies on ranks: what each of them holds, and with whom it shares."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from dynmoe.config import Config
from dynmoe.model.size import LayerSize, ModelSize


@dataclass(frozen=True)
class Layout:
    """A configuration on ``nodes`` nodes of ``ranks_per_node`` ranks, with a model of ``vocab_size`` rows."""

    config: Config
    nodes: int
    ranks_per_node: int
    vocab_size: int

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node

    @cached_property
    def size(self) -> ModelSize:
        return ModelSize(self.config.model, self.vocab_size, self.config.data.sequence_length)

    @property
    def element(self) -> int:
        """Bytes of a weight or activation."""
        return 4 if self.config.train.precision == "fp32" else 2

    @property
    def data_parallel(self) -> int:
        """Ranks that hold the same dense parameters, over which they and their optimizer may be spread."""
        return self.config.data_parallel(self.world_size) * self.config.parallel.context

    @property
    def expert_data_parallel(self) -> int:
        """Ranks that hold the same experts."""
        parallel = self.config.parallel
        return self.world_size // (parallel.pipeline * parallel.expert)

    @property
    def accumulation(self) -> int:
        return self.config.accumulation(self.world_size)

    @property
    def tokens(self) -> int:
        """Tokens of a forward pass on one rank: its part of each sequence."""
        train, parallel = self.config.train, self.config.parallel
        return train.micro_batch * self.config.data.sequence_length // (parallel.tensor * parallel.context)

    def layers(self, stage: int) -> list[int]:
        """Decoder layers of a pipeline stage, the parts of an interleaved one together."""
        parallel, layers = self.config.parallel, self.config.model.layers
        parts = parallel.pipeline * parallel.virtual_pipeline
        length = layers // parts
        return [layer for layer in range(layers) if layer // length % parallel.pipeline == stage]

    def dense_parameters(self, stage: int) -> int:
        """Parameters of one rank that are no routed experts."""
        model, parallel = self.config.model, self.config.parallel
        total = sum(self._dense(self.size.layer(layer)) for layer in self.layers(stage))
        first, last = stage == 0, stage == parallel.pipeline - 1
        tied = model.tie_embeddings and parallel.pipeline == 1
        embeddings = int(first) + int(last and not tied)
        return total + embeddings * self.size.embedding // parallel.tensor + (model.hidden if last else 0)

    def _dense(self, layer: LayerSize) -> int:
        spread = (layer.attention + layer.dense) // self.config.parallel.tensor
        return spread + layer.norms + layer.router + layer.shared

    def expert_parameters(self, stage: int) -> int:
        """Parameters of the routed experts of one rank."""
        return sum(self.size.layer(layer).experts for layer in self.layers(stage)) // self.config.parallel.expert
