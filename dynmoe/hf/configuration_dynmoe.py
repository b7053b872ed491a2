"""Configuration of a DynMoE model in transformers. This file travels with the weights."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from dynmoe.errors import ConfigError
from dynmoe.routers import router_of


class DynMoEConfig(PreTrainedConfig):
    """A Llama-style decoder with mixtures of experts in which each token has as many experts as it needs.

    Args:
        layer_experts: of each layer; 0 where the layer is dense. A field called ``num_experts`` would promise servers a
            fixed number of experts per token.
        head_dim: width of an attention head; None: hidden_size / num_attention_heads.
        qk_norm: RMSNorm of queries and keys: of each ``head``, of the whole ``projection``, or None.
        intermediate_size: width of dense layers.
        moe_intermediate_size: width of an expert.
        shared_expert_intermediate_size: width of the expert that every token uses; 0: none.
        router: ``kind`` and what it needs, as DynMoE's export writes it: see ``DynMoERouter``.
        router_overrides: ``served_fields`` of the router, to take more experts or fewer than in training.
        count_experts: sum up the tokens of each layer and their experts: see ``DynMoEModel.expert_counts``.
        output_router_logits: give logits, routing maps and experts per token along, and add the routers' own losses,
            with their coefficients in ``router``, to the loss.

    Raises:
        ValueError: an override that the router does not have, or out of its range.
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
        layer_experts: list[int] | None = None,
        moe_intermediate_size: int = 512,
        shared_expert_intermediate_size: int = 0,
        router: dict[str, Any] | None = None,
        router_overrides: dict[str, Any] | None = None,
        count_experts: bool = False,
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
        self.layer_experts = [16] * num_hidden_layers if layer_experts is None else layer_experts
        self.moe_intermediate_size = moe_intermediate_size
        self.shared_expert_intermediate_size = shared_expert_intermediate_size
        self.router: dict[str, Any] = {"kind": "top_p", "p": 0.4} if router is None else router
        self.router_overrides, self.count_experts = router_overrides, count_experts
        self.check_overrides()
        self.base_model_tp_plan = tensor_parallel_plan(self, gathers=qk_norm == "projection")
        self.output_router_logits, self.use_cache = output_router_logits, use_cache
        self.tie_word_embeddings = tie_word_embeddings
        self.pad_token_id, self.bos_token_id, self.eos_token_id = pad_token_id, bos_token_id, eos_token_id
        super().__init__(
            tie_word_embeddings=tie_word_embeddings, pad_token_id=pad_token_id, bos_token_id=bos_token_id,
            eos_token_id=eos_token_id, **kwargs,
        )  # fmt: skip

    def check_overrides(self) -> None:
        """Raises a ValueError for an override that the router does not have, or out of its range.

        Servers change fields of a configuration that is made already; a model looks again.
        """
        spec = router_of(self.router)
        overrides = self.router_overrides or {}
        known = spec.served_fields
        for name, value in overrides.items():
            problem = f"router_overrides.{name}={value!r}"
            if name not in known:
                cure = f"use {' or '.join(known)}" if known else "its experts per token cannot be set"
                raise ValueError(f"{problem}: router.kind={spec.kind!r} has no such setting; {cure}")
            takes_fractions = spec.__dataclass_fields__[name].type == "float"
            if isinstance(value, bool) or not isinstance(value, int | float if takes_fractions else int):
                raise ValueError(f"{problem} must be {'a number' if takes_fractions else 'a whole number'}")
        experts = [count for count in self.layer_experts if count]
        try:
            router_of(self.router | overrides).check_layers(min(experts, default=0), min(experts, default=0))
        except ConfigError as error:
            text = str(error).replace("model.router.", "router_overrides.")
            raise ValueError(text.replace("model.moe.experts", "the number of experts")) from None


def tensor_parallel_plan(config: DynMoEConfig, gathers: bool) -> dict[str, str]:
    """How the layers that there are are cut over ranks; the router stays whole.

    With ``gathers`` each rank sees the queries and keys of all heads, as a norm over all of them wants.
    """
    columns, rows = ("colwise_gather_output", "rowwise_split_input") if gathers else ("colwise", "rowwise")
    plan = {f"layers.*.self_attn.{name}_proj": columns for name in "qkv"} | {"layers.*.self_attn.o_proj": rows}
    if config.qk_norm == "head":
        plan |= {f"layers.*.self_attn.{name}_norm": "replicated_with_grad_allreduce" for name in "qk"}
    has_experts = any(config.layer_experts)
    shares = has_experts and config.shared_expert_intermediate_size > 0
    for mlp in ["mlp"] * (0 in config.layer_experts) + ["mlp.shared_expert"] * shares:
        plan |= {f"layers.*.{mlp}.{name}_proj": "colwise" for name in ("gate", "up")}
        plan |= {f"layers.*.{mlp}.down_proj": "rowwise"}
    if has_experts:
        plan |= {
            "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
            "layers.*.mlp.experts.down_proj": "rowwise",
            "layers.*.mlp.experts": "moe_tp_experts",
        }
    return plan
