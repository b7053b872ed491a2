"""Configuration of the model: the decoder, its experts and their router."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Optional

from dynmoe.errors import ConfigError
from dynmoe.fields import Section, check_multiple_of_8, option
from dynmoe.routers import RouterSpec, TopP


@dataclass
class MoEConfig(Section):
    _section: ClassVar[str] = "model.moe"

    experts: int = option(16, "experts of one MoE layer (0: a dense model)", at_least=0)
    experts_by_layer: list[int] = option(
        [], "experts of each MoE layer, where they differ (after dynmoe.compact)", at_least=1
    )
    active_at_start: Optional[int] = option(
        None, "top_any: experts in use at the start; the other slots wait for adaptation. null: all", at_least=1
    )
    expert_hidden: int = option(512, "width of one SwiGLU expert", at_least=1)
    shared_hidden: int = option(0, "width of a shared expert that every token uses (0: none)", at_least=0)
    moe_layer_freq: int = option(
        1, "every n-th layer is an MoE layer, starting with the first; the others are dense SwiGLU layers", at_least=1
    )
    capacity_factor: Optional[float] = option(
        None, "limit of routes per expert and rank in training, relative to perfect balance at the observed experts "
        "per token (a moving average); null: no limit", above=0,
    )  # fmt: skip
    drop_policy: str = option(
        "probs", "which routes are dropped beyond a limit: those of the lowest scores, or of the last positions",
        choices=("probs", "position"),
    )  # fmt: skip
    max_mean_experts_per_token: Optional[float] = option(
        None, "limit of the experts per token in training, averaged over the tokens of one rank and micro-batch. It "
        "bounds the memory of a layer, which a GPU then allocates whole instead of waiting for a count; with "
        "parallel.expert it bounds the routes that a rank sends, not those that it receives (see capacity_factor). "
        "null: no limit", at_least=1,
    )  # fmt: skip
    on_overflow: str = option(
        "error", "what happens where tokens select more than max_mean_experts_per_token: the run ends, or the worst "
        "routes of every token are dropped", choices=("error", "drop"),
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("expert_hidden", "shared_hidden"):
            check_multiple_of_8(f"model.moe.{name}", getattr(self, name))
        smallest = min(self.experts_by_layer or [self.experts])
        if self.active_at_start is not None and self.active_at_start > smallest:
            cure = f"use at most the number of experts ({smallest})"
            raise ConfigError("model.moe.active_at_start", self.active_at_start, "is more than there are", cure)


@dataclass
class ModelConfig(Section):
    _section: ClassVar[str] = "model"

    layers: int = option(4, "decoder layers", at_least=1, at_most=10_000)
    hidden: int = option(256, "model dimension", at_least=1)
    heads: int = option(4, "attention heads", at_least=1)
    kv_heads: int = option(2, "key-value heads (grouped-query attention)", at_least=1)
    head_dim: Optional[int] = option(None, "width of one attention head; null: model.hidden / model.heads", at_least=2)
    qk_norm: Optional[str] = option(
        None, "RMSNorm of queries and keys before rotation: of each head, or of all heads together. null: none",
        choices=("head", "projection"),
    )  # fmt: skip
    ffn_hidden: int = option(1024, "width of a dense SwiGLU layer", at_least=1)
    vocab_size: Optional[int] = option(None, "rows of the embedding; null: the tokenizer's, padded", at_least=1)
    norm_eps: float = option(1e-5, "epsilon of RMSNorm", above=0)
    rope_theta: float = option(10000.0, "base of the rotary position embedding", above=0)
    tie_embeddings: bool = option(False, "use the input embedding as the output projection")
    init_std: float = option(0.02, "standard deviation of initial weights", above=0)
    moe: MoEConfig = field(default_factory=MoEConfig)
    router: RouterSpec = field(default_factory=TopP)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("hidden", "ffn_hidden"):
            check_multiple_of_8(f"model.{name}", getattr(self, name))
        if self.head_dim is None and (self.hidden % self.heads or self.width_of_head % 2):
            raise ConfigError(
                "model.heads", self.heads, f"must divide model.hidden ({self.hidden}) into even head dimensions",
                "change one of them, or set model.head_dim",
            )  # fmt: skip
        if self.width_of_head % 2:
            problem, cure = "must be even for rotary positions", "use an even number"
            raise ConfigError("model.head_dim", self.head_dim, problem, cure)
        if self.heads % self.kv_heads:
            cure = "use a divisor of it"
            raise ConfigError("model.kv_heads", self.kv_heads, f"must divide model.heads ({self.heads})", cure)
        self._check_experts()

    def _check_experts(self) -> None:
        moe, router, layers = self.moe, self.router, len(self.moe_layers)
        if moe.experts_by_layer and len(moe.experts_by_layer) != layers:
            cure = f"give {layers} numbers, one for each MoE layer, or none"
            raise ConfigError("model.moe.experts_by_layer", moe.experts_by_layer, "does not match the layers", cure)
        if moe.active_at_start is not None and not router.ADAPTS:
            problem = f"the {router.kind} router uses all of its experts"
            raise ConfigError("model.moe.active_at_start", moe.active_at_start, problem, "remove it")
        if layers == 0:
            return
        router.check_layers(self.min_experts_per_layer, self.max_experts_per_layer)
        limit = moe.max_mean_experts_per_token
        fewest = router.min_experts_per_token
        if limit is not None and limit < fewest:
            cure = f"use at least the {fewest} experts that every token has"
            raise ConfigError("model.moe.max_mean_experts_per_token", limit, "is always exceeded", cure)
        if limit is None and moe.on_overflow != "error":
            cure = "set model.moe.max_mean_experts_per_token"
            raise ConfigError("model.moe.on_overflow", moe.on_overflow, "there is no limit to exceed", cure)

    @property
    def width_of_head(self) -> int:
        return self.head_dim or self.hidden // self.heads

    def is_moe_layer(self, layer: int) -> bool:
        return self.moe.experts > 0 and layer % self.moe.moe_layer_freq == 0

    def experts_of(self, layer: int) -> int:
        """Expert slots of MoE layer ``layer`` (its index in the decoder)."""
        by_layer = self.moe.experts_by_layer
        return by_layer[layer // self.moe.moe_layer_freq] if by_layer else self.moe.experts

    @property
    def min_experts_per_layer(self) -> int:
        """Experts of the MoE layer that has the fewest."""
        return min(self.moe.experts_by_layer or [self.moe.experts])

    @property
    def max_experts_per_layer(self) -> int:
        """Experts of the MoE layer that has the most."""
        return max(self.moe.experts_by_layer or [self.moe.experts])

    @property
    def moe_size(self) -> str:
        """Experts of an MoE layer in words: one number, or the smallest to the largest."""
        return " to ".join(str(count) for count in sorted({self.min_experts_per_layer, self.max_experts_per_layer}))

    @property
    def moe_layers(self) -> list[int]:
        """Indices of the layers that are mixtures of experts."""
        return [layer for layer in range(self.layers) if self.is_moe_layer(layer)]
