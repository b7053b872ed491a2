"""Configuration of a DynMoE model in transformers. This file travels with the weights."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig


class DynMoEConfig(PreTrainedConfig):
    """A Llama-style decoder with mixtures of experts in which each token has as many experts as it needs.

    Args:
        num_experts: of each layer; 0 where the layer is dense.
        head_dim: width of an attention head; None: hidden_size / num_attention_heads.
        qk_norm: RMSNorm of queries and keys: of each ``head``, of the whole ``projection``, or None.
        intermediate_size: width of dense layers.
        moe_intermediate_size: width of an expert.
        shared_expert_intermediate_size: width of the expert that every token uses; 0: none.
        router: ``kind`` and what it needs, as DynMoE's export writes it: see ``DynMoERouter``.
        output_router_logits: give logits, routing maps and experts per token along, and add the routers' own losses,
            with their coefficients in ``router``, to the loss.
    """

    model_type = "dynmoe"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]  # noqa: RUF012

    def __init__(
        self,
        vocab_size: int = 32000,
        hidden_size: int = 256,
        intermediate_size: int = 1024,
        num_hidden_layers: int = 4,
        num_attention_heads: int = 4,
        num_key_value_heads: int = 2,
        head_dim: int | None = None,
        qk_norm: str | None = None,
        max_position_embeddings: int = 512,
        rope_theta: float = 10000.0,
        rms_norm_eps: float = 1e-5,
        initializer_range: float = 0.02,
        num_experts: list[int] | None = None,
        moe_intermediate_size: int = 512,
        shared_expert_intermediate_size: int = 0,
        router: dict[str, Any] | None = None,
        output_router_logits: bool = False,
        use_cache: bool = True,
        tie_word_embeddings: bool = False,
        pad_token_id: int | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.vocab_size, self.hidden_size, self.intermediate_size = vocab_size, hidden_size, intermediate_size
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = hidden_size // num_attention_heads if head_dim is None else head_dim
        self.qk_norm = qk_norm
        self.max_position_embeddings, self.rope_theta = max_position_embeddings, rope_theta
        self.rms_norm_eps, self.initializer_range = rms_norm_eps, initializer_range
        self.num_experts = [16] * num_hidden_layers if num_experts is None else num_experts
        self.moe_intermediate_size = moe_intermediate_size
        self.shared_expert_intermediate_size = shared_expert_intermediate_size
        self.router: dict[str, Any] = {"kind": "top_p", "p": 0.4} if router is None else router
        self.output_router_logits, self.use_cache = output_router_logits, use_cache
        self.tie_word_embeddings = tie_word_embeddings
        self.pad_token_id, self.bos_token_id, self.eos_token_id = pad_token_id, bos_token_id, eos_token_id
        super().__init__(
            tie_word_embeddings=tie_word_embeddings, pad_token_id=pad_token_id, bos_token_id=bos_token_id,
            eos_token_id=eos_token_id, **kwargs,
        )  # fmt: skip
