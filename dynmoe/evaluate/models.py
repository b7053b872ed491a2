"""A model as scoring sees it: whole in this process, or as it lies spread over the ranks of a training."""

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
    """Every method is collective over the ranks that hold the model.

    Attributes:
        config: of the run.
        tokenizer: of the run.
        device: of this rank.
        layers: MoE layers of this rank, in their order.
        vocab_size: logits of one position.
        parts: sequences have a multiple of so many tokens.
        data_rank: which share of the passes this rank computes.
        data_size: how many shares there are.
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
        """Logits [N, V] after the N positions that are wanted, in their order, fp32."""

    def positions(self, length: int) -> Tensor:
        """Positions of a sequence of ``length`` tokens that this rank's layers compute, in their order; local."""

    def reduce(self, values: Tensor, op: dist.ReduceOp.RedOpType) -> None:
        """Reduces over all ranks, in place."""


class WholeModel:
    """A trained model, in this process alone; fulfils :class:`ScoredModel`."""

    parts, data_rank, data_size = 1, 0, 1

    def __init__(self, model: TrainedModel) -> None:
        self.trained, self.config, self.tokenizer, self.device = model, model.config, model.tokenizer, model.device
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
    """The model of an engine between two steps; fulfils :class:`ScoredModel`."""

    def __init__(self, engine: Engine, config: Config, tokenizer: Tokenizer, vocab_size: int) -> None:
        self.config, self.tokenizer, self.vocab_size = config, tokenizer, vocab_size
        self.device, self.layers, self._engine = engine.device, engine.layers, engine
        self.data_rank, self.data_size, self.parts = engine.data_rank, engine.data_size, config.parallel.sequence_parts

    def logits(self, tokens_BS: Tensor, wanted_BS: Tensor) -> Tensor:
        return self._engine.logits(tokens_BS)[wanted_BS].float()

    def positions(self, length: int) -> Tensor:
        return self._engine.positions(length)

    def reduce(self, values: Tensor, op: dist.ReduceOp.RedOpType) -> None:
        dist.all_reduce(values, op=op)
