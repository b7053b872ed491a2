"""Configuration of a DynMoE model in transformers. This file ships with the weights."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from dynmoe.errors import ConfigError
from dynmoe.routers import router_of


class DynMoEConfig(PreTrainedConfig):
    """A Llama-style MoE decoder in which each token takes a dynamic number of experts.

    Args:
        layer_experts: number of experts of each layer; 0 for a dense layer. It is not called ``num_experts``, because
            servers take that as a fixed number of experts per token.
        head_dim: width of an attention head; None: hidden_size / num_attention_heads.
        attention_bias: biases of queries, keys and values (``qkv``), also of the output (``all``), or None.
        sliding_window: positions that a token attends to in layers of type ``sliding_attention``.
        layer_types: ``full_attention`` or ``sliding_attention`` for each layer; None: all full.
        qk_norm: RMSNorm of queries and keys: of each ``head``, of the whole ``projection``, or None.
        intermediate_size: width of dense layers.
        moe_intermediate_size: width of an expert.
        shared_expert_intermediate_size: width of the expert that every token uses; 0: none.
        shared_expert_gate: whether the sigmoid of a gate multiplies it.
        router: ``kind`` and the fields of that router, as DynMoE exports them; see ``DynMoERouter``.
        router_overrides: new values for ``served_fields`` of the router, to change the experts per token.
        count_experts: count tokens and their experts in each layer; see ``DynMoEModel.expert_counts``.
        output_router_logits: also return logits, routing maps and experts per token, and add the routers' auxiliary
            losses, with their coefficients in ``router``, to the loss.

    Raises:
        ValueError: the router has no such override, or its value is out of range.
    """

    model_type = "dynmoe"
    # Predictions are the logits alone: what routers return cannot be joined over batches of different lengths.
    keys_to_ignore_at_inference = [  # noqa: RUF012
        "cache", "past_key_values", "router_logits", "routing_maps", "experts_per_token", "aux_loss",
    ]  # fmt: skip

    def __init__(
        self,
        vocab_size: int = 32000,
        hidden_size: int = 256,
        intermediate_size: int = 1024,
        num_hidden_layers: int = 4,
        num_attention_heads: int = 4,
        num_key_value_heads: int = 2,
        head_dim: int | None = None,
        attention_bias: str | None = None,
        sliding_window: int | None = None,
        layer_types: list[str] | None = None,
        qk_norm: str | None = None,
        max_position_embeddings: int = 512,
        rope_theta: float = 10000.0,
        rms_norm_eps: float = 1e-5,
        initializer_range: float = 0.02,
        layer_experts: list[int] | None = None,
        moe_intermediate_size: int = 512,
        shared_expert_intermediate_size: int = 0,
        shared_expert_gate: bool = False,
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
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = hidden_size // num_attention_heads if head_dim is None else head_dim
        self.attention_bias = attention_bias
        self.sliding_window = sliding_window
        self.layer_types = ["full_attention"] * num_hidden_layers if layer_types is None else layer_types
        self.qk_norm = qk_norm
        self.max_position_embeddings = max_position_embeddings
        self.rope_theta = rope_theta
        self.rms_norm_eps = rms_norm_eps
        self.initializer_range = initializer_range
        self.layer_experts = [16] * num_hidden_layers if layer_experts is None else layer_experts
        self.moe_intermediate_size = moe_intermediate_size
        self.shared_expert_intermediate_size = shared_expert_intermediate_size
        self.shared_expert_gate = shared_expert_gate
        self.router: dict[str, Any] = {"kind": "top_p", "p": 0.4} if router is None else router
        self.router_overrides = router_overrides
        self.count_experts = count_experts
        self.check_overrides()
        self.base_model_tp_plan = tensor_parallel_plan(self, gathers=qk_norm == "projection")
        self.output_router_logits = output_router_logits
        self.use_cache = use_cache
        self.tie_word_embeddings = tie_word_embeddings
        self.pad_token_id = pad_token_id
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        super().__init__(
            tie_word_embeddings=tie_word_embeddings, pad_token_id=pad_token_id, bos_token_id=bos_token_id,
            eos_token_id=eos_token_id, **kwargs,
        )  # fmt: skip

    def check_overrides(self) -> None:
        """Raises a ValueError if the router has no such override, or its value is out of range.

        The model calls this again, because servers change the fields of an existing configuration.
        """
        spec = router_of(self.router)
        overrides = self.router_overrides or {}
        known = spec.served_fields
        if spec.budgets:  # which replace the numbers that determine K
            known = (*(name for name in known if name not in ("k", "p")), "experts_per_token")
        for name, value in overrides.items():
            problem = f"router_overrides.{name}={value!r}"
            if name not in known:
                cure = f"use {' or '.join(known)}" if known else "its experts per token cannot be set"
                raise ValueError(f"{problem}: router.kind={spec.kind!r} has no such setting; {cure}")
            takes_fractions = name == "experts_per_token" or spec.__dataclass_fields__[name].type == "float"
            if isinstance(value, bool) or not isinstance(value, int | float if takes_fractions else int):
                raise ValueError(f"{problem}: must be {'a number' if takes_fractions else 'an integer'}")
        experts = [count for count in self.layer_experts if count]
        if "experts_per_token" in overrides:
            try:
                spec.check_budget(overrides["experts_per_token"], "router_overrides.experts_per_token")
            except ConfigError as error:
                raise ValueError(str(error).replace("model.router.budgets", "the budgets")) from None
        if not experts:
            return
        try:
            # The number of experts at the start of a training may be above that of a compacted layer.
            router_of(self.router | overrides | {"initial_experts": None}).check_layers(experts)
        except ConfigError as error:
            text = str(error).replace("model.router.", "router_overrides.")
            raise ValueError(text.replace("model.moe.experts", "the number of experts")) from None


def tensor_parallel_plan(config: DynMoEConfig, gathers: bool) -> dict[str, str]:
    """How the existing layers are split over tensor-parallel ranks; the router is replicated.

    With ``gathers`` each rank gets the queries and keys of all heads, which a norm over all heads requires.
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
