"""Megatron's multi-head latent attention with projections to the latents that every tensor-parallel rank has."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.transformer_config import MLATransformerConfig
from torch import Tensor, nn

from dynmoe.config import ModelConfig
from dynmoe.engines.megatron.attention import DocumentRotaryEmbedding
from dynmoe.model.documents import Documents
from dynmoe.model.latent_attention import LatentNorm
from dynmoe.model.rotary import frequencies


class _ReplicatedLinear(nn.Linear):
    """A projection of this rank's part of the sequences; returns no bias, as Megatron's projections do."""

    def __init__(self, config: MLATransformerConfig, columns: int, rows: int) -> None:
        super().__init__(columns, rows, bias=False, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return F.linear(x, self.weight), None


def _norm(config: MLATransformerConfig, model: ModelConfig, width: int) -> LatentNorm:
    norm = LatentNorm(model, width)
    norm.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return norm


class LatentSelfAttention(MLASelfAttention):
    """Latent attention with our norms and positions.

    Megatron's local layers shard the projections to the latents. Each rank's heads then have their own gradient of the
    shared key, and nothing sums them over the ranks.
    """

    def __init__(self, config: MLATransformerConfig, *args: Any, model: ModelConfig, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        latent = model.latent
        assert latent.kv_lora_rank is not None
        if latent.q_lora_rank is not None:
            self.linear_q_down_proj = _ReplicatedLinear(config, model.hidden, latent.q_lora_rank)
            self.q_layernorm = _norm(config, model, latent.q_lora_rank)
        rows = latent.kv_lora_rank + latent.qk_rope_head_dim
        self.linear_kv_down_proj = _ReplicatedLinear(config, model.hidden, rows)
        self.kv_layernorm = _norm(config, model, latent.kv_lora_rank)
        self.rotary_pos_emb.__class__ = DocumentRotaryEmbedding
        self.rotary_pos_emb.inv_freq = frequencies(model, self.rotary_pos_emb.inv_freq.device)

    def forward(self, hidden_states: Tensor, attention_mask: Documents, *args: Any, **kwargs: Any) -> Any:
        # A pass that recomputes the layer has the documents of its own micro-batch, so they are not set from outside.
        self.rotary_pos_emb.documents = attention_mask
        return super().forward(hidden_states, attention_mask, *args, **kwargs)
