"""The distribution of a model over ranks: parameters per rank and the sizes of its process groups."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from dynmoe.config import Config
from dynmoe.model.size import ModelSize


@dataclass(frozen=True)
class Layout:
    """A configuration on ``nodes`` nodes of ``ranks_per_node`` ranks, with ``vocab_size`` embedding rows."""

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
        """Bytes per weight or activation."""
        return 4 if self.config.train.precision == "fp32" else 2

    @property
    def data_parallel(self) -> int:
        """Number of ranks with the same dense parameters, over which the optimizer state may be sharded."""
        return self.config.data_parallel(self.world_size) * self.config.parallel.context

    @property
    def expert_data_parallel(self) -> int:
        """Number of ranks with the same experts."""
        parallel = self.config.parallel
        return self.world_size // (parallel.pipeline * parallel.expert)

    @property
    def accumulation(self) -> int:
        return self.config.accumulation(self.world_size)

    @property
    def tokens(self) -> int:
        """Tokens per forward pass on one rank: its part of each sequence."""
        config = self.config
        split = config.parallel.tensor * config.parallel.context
        return config.train.micro_batch * config.data.sequence_length // split

    def layers(self, stage: int) -> list[int]:
        """Decoder layers of a pipeline stage, including all chunks of an interleaved one.

        Those that predict further tokens are in the last stage.
        """
        parallel = self.config.parallel
        model = self.config.model
        length = model.layers // (parallel.pipeline * parallel.virtual_pipeline)
        own = [layer for layer in range(model.layers) if layer // length % parallel.pipeline == stage]
        return own + (list(range(model.layers, model.trained_layers)) if stage == parallel.pipeline - 1 else [])

    @cached_property
    def heaviest_stage(self) -> int:
        """The pipeline stage with the most experts, for which the others wait; the first of equal ones."""
        return max(range(self.config.parallel.pipeline), key=self.expert_parameters)

    def dense_parameters(self, stage: int) -> int:
        """Number of parameters on one rank, without routed experts."""
        model = self.config.model
        parallel = self.config.parallel
        layers = [self.size.layer(layer) for layer in self.layers(stage)]
        split = sum((x.attention + x.dense) // parallel.tensor for x in layers)
        total = split + sum(x.norms + x.replicated + x.router + x.shared for x in layers)
        last = stage == parallel.pipeline - 1
        tied = model.tie_embeddings and parallel.pipeline == 1
        copied = model.mtp.layers > 0 and not model.tie_embeddings and parallel.pipeline > 1  # of the first stage's
        embeddings = int(stage == 0) + int(last and not tied) + int(last and copied)
        return total + embeddings * self.size.embedding // parallel.tensor + (model.hidden if last else 0)

    def dense_matrices(self, stage: int) -> int:
        """Number of dense parameters on one rank that Muon would update."""
        layers = [self.size.layer(layer) for layer in self.layers(stage)]
        return sum((x.attention + x.dense) // self.config.parallel.tensor + x.replicated + x.shared for x in layers)

    def layer_parameters(self, layer: int) -> int:
        """Number of parameters of a decoder layer on one rank, without tensor parallelism."""
        size = self.size.layer(layer)
        return size.without_experts + size.experts // self.config.parallel.expert

    def expert_parameters(self, stage: int) -> int:
        """Number of parameters of the routed experts on one rank."""
        return sum(self.size.layer(layer).experts for layer in self.layers(stage)) // self.config.parallel.expert
