"""Numbers of parameters and floating-point operations, computed from the configuration."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from dynmoe.config import ModelConfig


@dataclass(frozen=True)
class LayerSize:
    """Parameters of one decoder layer, grouped by how they are sharded."""

    attention: int
    norms: int  # and biases of attention
    replicated: int = 0  # matrices that every tensor-parallel rank has: to latents of attention, of joined inputs
    dense: int = 0  # dense feed-forward
    router: int = 0
    shared: int = 0
    experts: int = 0

    @property
    def without_experts(self) -> int:
        return self.attention + self.norms + self.replicated + self.dense + self.router + self.shared


@dataclass(frozen=True)
class ModelSize:
    """Counts for a model with ``vocab_size`` embedding rows, trained on sequences of ``sequence_length`` tokens."""

    model: ModelConfig
    vocab_size: int
    sequence_length: int

    @property
    def expert(self) -> int:
        """Parameters of one expert."""
        return 3 * self.model.hidden * self.model.moe.expert_hidden

    def _router(self, layer: int) -> int:
        tensors = self.model.router.parameters(self.model.hidden, self.model.experts_of(layer))
        return sum(math.prod(tensor.shape) for tensor in tensors.values())

    @property
    def _qk_norms(self) -> int:
        model = self.model
        heads = {None: 0, "head": 2, "projection": model.heads + model.kv_heads}[model.qk_norm]
        return heads * model.width_of_head

    @property
    def _attention_biases(self) -> int:
        model = self.model
        rows = (model.heads + 2 * model.kv_heads) * model.width_of_head
        return {None: 0, "qkv": rows, "all": rows + model.hidden}[model.attention_bias]

    @property
    def _attention(self) -> LayerSize:
        """The part of a layer that is attention, and both norms."""
        model = self.model
        latent = model.latent
        norms = 2 * model.hidden + self._qk_norms + self._attention_biases
        if latent.kv_lora_rank is None:
            return LayerSize(model.hidden * (2 * model.heads + 2 * model.kv_heads) * model.width_of_head, norms)
        ranks = latent.kv_lora_rank + (latent.q_lora_rank or 0)
        queries = (latent.q_lora_rank or model.hidden) * latent.width_of_key
        keys_and_values = latent.kv_lora_rank * (latent.qk_nope_head_dim + latent.v_head_dim)
        heads = model.heads * (queries + keys_and_values + latent.v_head_dim * model.hidden)
        return LayerSize(heads, norms + ranks, replicated=model.hidden * (ranks + latent.qk_rope_head_dim))

    def layer(self, layer: int) -> LayerSize:
        """Parameters of decoder layer ``layer``."""
        model = self.model
        size = self._attention
        if layer >= model.layers:  # predicts a further token: two inputs, each with a norm, and a final norm
            joined = 2 * model.hidden**2
            size = replace(size, norms=size.norms + 3 * model.hidden, replicated=size.replicated + joined)
        if model.has_feed_forward(layer):
            size = replace(size, dense=3 * model.hidden * model.ffn_hidden)
        if not model.is_moe_layer(layer):
            return size
        shared = model.hidden * (3 * model.moe.shared_hidden + int(model.moe.shared_gate))
        experts = model.experts_of(layer) * self.expert
        return replace(size, router=self._router(layer), shared=shared, experts=experts)

    @property
    def embedding(self) -> int:
        """Parameters of the embedding, and of the output projection if it is not tied."""
        return self.vocab_size * self.model.hidden

    def _outside_experts(self, layers: int) -> int:
        """Parameters outside of experts, with the first ``layers`` layers."""
        embeddings = self.embedding * (1 if self.model.tie_embeddings else 2)
        inside = sum(self.layer(layer).without_experts for layer in range(layers))
        return embeddings + inside + self.model.hidden  # the final norm

    @property
    def total_parameters(self) -> int:
        """Parameters in training, with those of layers that predict further tokens."""
        experts = sum(self.model.experts_of(layer) for layer in self.model.moe_layers)
        return self._outside_experts(self.model.trained_layers) + experts * self.expert

    def active_parameters(self, experts_per_token: float) -> float:
        """Parameters that a token uses outside of training with ``experts_per_token`` experts in each MoE layer."""
        layers = [layer for layer in self.model.moe_layers if layer < self.model.layers]
        return self._outside_experts(self.model.layers) + len(layers) * experts_per_token * self.expert

    def flops(self, tokens: int, routed_rows: int) -> int:
        """Matrix-product FLOPs of training on ``tokens`` tokens with ``routed_rows`` rows in all MoE layers together.

        Forward and backward (three times the forward), two per multiply-add, causal attention at half. Embedding
        lookup, norms, optimizer and recomputation are not counted.
        """
        model = self.model
        layers = range(model.trained_layers)
        matrices = sum(self.layer(layer).without_experts - self.layer(layer).norms for layer in layers)
        per_token = self.embedding * (1 + model.mtp.layers) + matrices
        visible = sum(self._visible(model.window_of(layer)) for layer in layers)
        attention = visible * model.heads * (model.width_of_head + model.width_of_value) // 2
        return 6 * (tokens * (per_token + attention) + routed_rows * self.expert)

    def _visible(self, window: int | None) -> int:
        """Twice the positions that a token attends to on average."""
        length = self.sequence_length
        return length if window is None or window >= length else window * (2 * length - window) // length

    def static_flops(self, tokens: int, experts_per_token: float) -> float:
        """Like :meth:`flops`, with an assumed number of experts per token instead of measured rows."""
        return self.flops(tokens, 0) + 6 * tokens * len(self.model.moe_layers) * experts_per_token * self.expert
