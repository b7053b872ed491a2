"""Multi-token prediction: layers behind the last one predict tokens after the next one (arXiv 2412.19437, 2.2).

Layer k = 1, 2, ... takes the representation of position i from the layer before it and the embedding of token i + k,
and predicts token i + k + 1. It has one decoder layer; embedding and output projection are those of the model:

    h_k = Norm_k(DecoderLayer_k(W_k [Norm(Emb(t_{i+k})); Norm(h_{k-1})]))
    loss = weight * mean_k CE(W_out h_k, t_{i+k+1})

h_0 is the output of the model's final norm. The paper leaves open whether it is normalized; published checkpoints were
trained so, and transformers and Megatron-Core have it so. The same holds for the order of the two inputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynmoe.config import ModelConfig
from dynmoe.moe.initialization import named_normal


class JoinedInputs(nn.Module):
    """The input of a prediction layer: embedding and representation, each normalized, projected from 2 D to D.

    Args:
        model: configuration of the model.
        layer: index of the layer.
        seed: of the initial weights.
    """

    def __init__(self, model: ModelConfig, layer: int, seed: int) -> None:
        super().__init__()
        self.embedding_norm = nn.RMSNorm(model.hidden, model.norm_eps)
        self.hidden_norm = nn.RMSNorm(model.hidden, model.norm_eps)
        shape = (model.hidden, 2 * model.hidden)
        self.w_join = nn.Parameter(named_normal(shape, model.init_std, seed, f"layers.{layer}.join.w_join"))

    def forward(self, embedded: Tensor, hidden: Tensor) -> Tensor:
        """Maps two [..., D] to [..., D]."""
        both = torch.cat([self.embedding_norm(embedded), self.hidden_norm(hidden)], dim=-1)
        return F.linear(both, self.w_join)
