"""The model interface for scoring: a whole model in this process, or the distributed model of a training run."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from dynmoe.config import Config
from dynmoe.data.tokenizer import Tokenizer
from dynmoe.moe import MoELayer
from dynmoe.train.engine import Engine
from dynmoe.trained import TrainedModel


class ScoredModel(Protocol):
    """A model to score. Every method except ``positions`` is collective over the ranks that hold the model.

    Attributes:
        layers: MoE layers of this rank, in order.
        vocab_size: number of logits per position.
        parts: sequence lengths must be a multiple of this.
        data_rank: data-parallel rank.
        data_size: data-parallel size.
    """

    config: Config
    tokenizer: Tokenizer
    device: torch.device
    layers: list[MoELayer]
    vocab_size: int
    parts: int
    data_rank: int
    data_size: int

    def logits(self, tokens_BS: Tensor, wanted_BS: Tensor) -> Tensor:
        """Logits [N, V] of the N positions wanted, in order, fp32."""

    def positions(self, length: int) -> Tensor:
        """Positions of a sequence of ``length`` tokens that this rank's layers compute, in order; not collective."""

    def reduce(self, values: Tensor, op: dist.ReduceOp.RedOpType) -> None:
        """Reduces over all ranks in place."""


class WholeModel:
    """A trained model in this process; implements :class:`ScoredModel`."""

    parts = 1
    data_rank = 0
    data_size = 1

    def __init__(self, model: TrainedModel) -> None:
        self.trained = model
        self.config = model.config
        self.tokenizer = model.tokenizer
        self.device = model.device
        self.layers: list[MoELayer] = model.decoder.moe_layers
        self.vocab_size = len(model.decoder.output_weight_VD)

    def logits(self, tokens_BS: Tensor, wanted_BS: Tensor) -> Tensor:
        decoder = self.trained.decoder
        return F.linear(decoder.hidden(tokens_BS)[wanted_BS], decoder.output_weight_VD)

    def positions(self, length: int) -> Tensor:
        return torch.arange(length)

    def reduce(self, values: Tensor, op: dist.ReduceOp.RedOpType) -> None:
        pass


class ModelInTraining:
    """The model of an engine between two steps; implements :class:`ScoredModel`."""

    def __init__(self, engine: Engine, config: Config, tokenizer: Tokenizer, vocab_size: int) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.device = engine.device
        self.layers = engine.layers
        self._engine = engine
        self.data_rank = engine.data_rank
        self.data_size = engine.data_size
        self.parts = config.parallel.sequence_parts

    def logits(self, tokens_BS: Tensor, wanted_BS: Tensor) -> Tensor:
        return self._engine.logits(tokens_BS)[wanted_BS].float()

    def positions(self, length: int) -> Tensor:
        return self._engine.positions(length)

    def reduce(self, values: Tensor, op: dist.ReduceOp.RedOpType) -> None:
        dist.all_reduce(values, op=op)
