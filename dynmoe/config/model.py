"""Configuration of the model: decoder, experts and router."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Optional

from dynmoe.config.latent import LatentConfig
from dynmoe.config.multi_token import MultiTokenConfig
from dynmoe.config.rope import RopeScalingConfig
from dynmoe.errors import ConfigError
from dynmoe.fields import Section, check_multiple_of_8, option
from dynmoe.routers import RouterSpec, TopP


@dataclass
class MoEConfig(Section):
    _section: ClassVar[str] = "model.moe"

    experts: int = option(16, "number of experts of an MoE layer (0: a dense model)", at_least=0)
    experts_by_layer: list[int] = option([], "experts of each MoE layer, if they differ (dynmoe.compact)", at_least=1)
    active_at_start: Optional[int] = option(
        None, "top_any: initially active experts; adaptation can activate the other slots. null: all", at_least=1
    )
    expert_hidden: int = option(512, "width of a SwiGLU expert", at_least=1)
    shared_hidden: int = option(0, "width of a shared expert that every token uses (0: none)", at_least=0)
    shared_gate: bool = option(False, "multiply the shared expert by the sigmoid of a trained gate (Qwen2-MoE)")
    moe_layer_freq: int = option(
        1, "every n-th layer, starting with the first, is an MoE layer; the others are dense", at_least=1
    )
    first_k_dense_replace: int = option(
        0, "the first layers of which none is an MoE layer, whatever moe_layer_freq says (DeepSeek-V3: 3)", at_least=0
    )
    shortcut: bool = option(
        False, "MoE layers have a dense SwiGLU too, and the output of their experts is added behind the next layer, "
        "which must be dense (shortcut-connected MoE, arXiv 2404.05019; LongCat-Flash)",
    )  # fmt: skip
    capacity_factor: Optional[float] = option(
        None, "limit of routes per expert and rank in training, relative to a perfectly balanced load at the moving "
        "average of experts per token, or at the budget of the step if there are several; null: no limit", above=0,
    )  # fmt: skip
    drop_policy: str = option(
        "probs", "which routes beyond a limit are dropped: those with the lowest scores, or the last positions",
        choices=("probs", "position"),
    )  # fmt: skip
    max_mean_experts_per_token: Optional[float] = option(
        None, "limit of experts per token in training, averaged over the tokens of one rank and micro-batch. It bounds "
        "the memory of a layer; on a GPU, buffers are allocated at this size up front, so the host does not wait for a "
        "row count. With parallel.expert it bounds the routes that a rank sends, not those that it receives (see "
        "capacity_factor). null: no limit", at_least=1,
    )  # fmt: skip
    on_overflow: str = option(
        "error", "what to do if tokens select more than max_mean_experts_per_token: stop the run, or drop the worst "
        "routes of every token", choices=("error", "drop"),
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("expert_hidden", "shared_hidden"):
            check_multiple_of_8(f"model.moe.{name}", getattr(self, name))
        if self.shared_gate and not self.shared_hidden:
            raise ConfigError("model.moe.shared_gate", True, "has no shared expert", "set model.moe.shared_hidden")
        smallest = min(self.experts_by_layer or [self.experts])
        if self.active_at_start is not None and self.active_at_start > smallest:
            cure = f"use at most {smallest}"
            raise ConfigError("model.moe.active_at_start", self.active_at_start, "exceeds the number of experts", cure)


# Fields of ordinary attention, with the reason against them.
_NOT_WITH_LATENT = {
    "head_dim": "latent attention takes its widths from model.latent",
    "qk_norm": "latent attention normalizes its latents",
    "attention_bias": "latent attention has no biases",
}


@dataclass
class ModelConfig(Section):
    _section: ClassVar[str] = "model"

    layers: int = option(4, "number of decoder layers", at_least=1, at_most=10_000)
    hidden: int = option(256, "model dimension", at_least=1)
    heads: int = option(4, "number of attention heads", at_least=1)
    kv_heads: int = option(2, "number of key-value heads (grouped-query attention)", at_least=1)
    head_dim: Optional[int] = option(None, "width of an attention head; null: model.hidden / model.heads", at_least=2)
    qk_norm: Optional[str] = option(
        None, "RMSNorm of queries and keys before rotary embedding, over each head or over all heads; null: none",
        choices=("head", "projection"),
    )  # fmt: skip
    attention_bias: Optional[str] = option(
        None, "biases in attention: of queries, keys and values (qkv), or also of the output (all); null: none",
        choices=("qkv", "all"),
    )  # fmt: skip
    window: Optional[int] = option(
        None, "positions that a token attends to, itself and those before it; null: all before it", at_least=1
    )
    full_attention_layers: list[int] = option([], "layers without the window, counted from 0", at_least=0)
    latent: LatentConfig = field(default_factory=LatentConfig)
    ffn_hidden: int = option(1024, "width of a dense SwiGLU layer", at_least=1)
    vocab_size: Optional[int] = option(None, "rows of the embedding; null: the tokenizer's, padded", at_least=1)
    norm_eps: float = option(1e-5, "epsilon of RMSNorm", above=0)
    rope_theta: float = option(10000.0, "base of the rotary position embedding", above=0)
    rope_scaling: RopeScalingConfig = field(default_factory=RopeScalingConfig)
    tie_embeddings: bool = option(False, "use the input embedding as the output projection")
    init_std: float = option(0.02, "standard deviation of initial weights", above=0)
    mtp: MultiTokenConfig = field(default_factory=MultiTokenConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    router: RouterSpec = field(default_factory=TopP)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("hidden", "ffn_hidden"):
            check_multiple_of_8(f"model.{name}", getattr(self, name))
        self._check_heads()
        if outside := [layer for layer in self.full_attention_layers if layer >= self.trained_layers]:
            problem = f"names layer {outside[0]} of {self.trained_layers}"
            raise ConfigError("model.full_attention_layers", self.full_attention_layers, problem, "count from 0")
        if self.full_attention_layers and self.window is None:
            problem = "all layers attend to everything"
            raise ConfigError("model.full_attention_layers", self.full_attention_layers, problem, "set model.window")
        self._check_experts()

    def _check_heads(self) -> None:
        if self.latent.enabled:
            if self.kv_heads != self.heads:
                problem = "every head has its own keys and values in latent attention"
                raise ConfigError("model.kv_heads", self.kv_heads, problem, f"use model.heads ({self.heads})")
            for name, problem in _NOT_WITH_LATENT.items():
                if getattr(self, name) is not None:
                    raise ConfigError(f"model.{name}", getattr(self, name), problem, "remove it")
            return
        if self.head_dim is None and (self.hidden % self.heads or self.width_of_head % 2):
            problem = f"must divide model.hidden ({self.hidden}) into even head dimensions"
            raise ConfigError("model.heads", self.heads, problem, "change one of them, or set model.head_dim")
        if self.width_of_head % 2:
            problem = "must be even for rotary position embedding"
            raise ConfigError("model.head_dim", self.head_dim, problem, "use an even number")
        if self.heads % self.kv_heads:
            problem = f"must divide model.heads ({self.heads})"
            raise ConfigError("model.kv_heads", self.kv_heads, problem, "use a divisor of it")

    def _check_experts(self) -> None:
        moe = self.moe
        router = self.router
        layers = len(self.moe_layers)
        if moe.experts > 0 and not any(self.is_moe_layer(layer) for layer in range(self.layers)):
            problem = f"leaves no MoE layer of {self.layers}"
            raise ConfigError("model.moe.first_k_dense_replace", moe.first_k_dense_replace, problem, "use fewer")
        if moe.experts_by_layer and len(moe.experts_by_layer) != layers:
            cure = f"use {layers} numbers, one for each MoE layer, or []"
            raise ConfigError("model.moe.experts_by_layer", moe.experts_by_layer, "does not match the layers", cure)
        if moe.active_at_start is not None and not router.ADAPTS:
            problem = f"the {router.kind} router cannot add experts later"
            raise ConfigError("model.moe.active_at_start", moe.active_at_start, problem, "remove it")
        self._check_shortcut()
        if layers == 0:
            return
        router.check_layers(moe.experts_by_layer or [moe.experts])
        router.parameters(self.hidden, self.max_experts_per_layer)  # may refuse the sizes
        limit = moe.max_mean_experts_per_token
        fewest = router.min_experts_per_token
        if limit is not None and limit < fewest:
            problem = f"is below the minimum of experts per token ({fewest})"
            raise ConfigError("model.moe.max_mean_experts_per_token", limit, problem, f"use at least {fewest}")
        if limit is None and moe.on_overflow != "error":
            cure = "set model.moe.max_mean_experts_per_token"
            raise ConfigError("model.moe.on_overflow", moe.on_overflow, "has no limit to enforce", cure)

    def _check_shortcut(self) -> None:
        if not self.moe.shortcut:
            return
        if not self.moe_layers:
            raise ConfigError("model.moe.shortcut", True, "the model is dense", "remove it, or set model.moe.experts")
        if self.moe.moe_layer_freq == 1:
            problem = "needs a dense layer behind every MoE layer"
            raise ConfigError("model.moe.shortcut", True, problem, "set model.moe.moe_layer_freq=2")
        if self.mtp.layers:
            problem = "does not work with model.moe.shortcut, whose experts need a dense layer behind them"
            raise ConfigError("model.mtp.layers", self.mtp.layers, problem, "use 0")
        if self.is_moe_layer(self.layers - 1):
            problem = "leaves no layer behind the last MoE layer, as model.moe.shortcut needs"
            raise ConfigError("model.layers", self.layers, problem, "add one, or remove one")

    @property
    def width_of_head(self) -> int:
        """Width of a query and key of one head."""
        return self.latent.width_of_key if self.latent.enabled else self.head_dim or self.hidden // self.heads

    @property
    def width_of_value(self) -> int:
        """Width of a value of one head."""
        return self.latent.v_head_dim if self.latent.enabled else self.width_of_head

    @property
    def width_of_rotated(self) -> int:
        """Width of the part of a query and key that is rotated."""
        return self.latent.qk_rope_head_dim if self.latent.enabled else self.width_of_head

    @property
    def latent_norm_eps(self) -> float:
        """Epsilon of the norms of the latents."""
        return self.norm_eps if self.latent.norm_eps is None else self.latent.norm_eps

    @property
    def trained_layers(self) -> int:
        """Number of decoder layers in training: also those that predict further tokens, behind the others."""
        return self.layers + self.mtp.layers

    def without_mtp(self) -> ModelConfig:
        """The model without the layers that predict further tokens, for everything but training."""
        full_attention = [layer for layer in self.full_attention_layers if layer < self.layers]
        num_moe = sum(layer < self.layers for layer in self.moe_layers)
        counts = self.moe.experts_by_layer[:num_moe]
        router = self.router.without_idle_maximum(counts) if counts else self.router
        moe = replace(self.moe, experts_by_layer=counts)
        return replace(self, mtp=MultiTokenConfig(), full_attention_layers=full_attention, moe=moe, router=router)

    def window_of(self, layer: int) -> int | None:
        """Positions that a token attends to in a layer; None: all up to itself."""
        return None if layer in self.full_attention_layers else self.window

    def is_moe_layer(self, layer: int) -> bool:
        moe = self.moe
        return moe.experts > 0 and layer >= moe.first_k_dense_replace and layer % moe.moe_layer_freq == 0

    def has_feed_forward(self, layer: int) -> bool:
        """Whether a layer has a dense feed-forward: every dense layer, and with a shortcut every MoE layer too."""
        return self.moe.shortcut or not self.is_moe_layer(layer)

    def experts_of(self, layer: int) -> int:
        """Number of expert slots of MoE layer ``layer`` (index in the decoder)."""
        moe = self.moe
        if not moe.experts_by_layer:
            return moe.experts
        without_experts = -(-moe.first_k_dense_replace // moe.moe_layer_freq)  # every n-th layers among the first ones
        return moe.experts_by_layer[layer // moe.moe_layer_freq - without_experts]

    def embedding_rows(self, tokenizer_size: int) -> int:
        """Rows of the embedding: as configured, or the size of the tokenizer rounded up to a multiple of 64.

        Raises:
            ConfigError: there are fewer rows than token ids.
        """
        if self.vocab_size is not None and self.vocab_size < tokenizer_size:
            cure = f"use at least {tokenizer_size}, or null"
            raise ConfigError("model.vocab_size", self.vocab_size, "is smaller than the tokenizer's vocabulary", cure)
        return self.vocab_size or -(-tokenizer_size // 64) * 64

    @property
    def min_experts_per_layer(self) -> int:
        """Number of experts of the smallest MoE layer."""
        return min(self.moe.experts_by_layer or [self.moe.experts])

    @property
    def max_experts_per_layer(self) -> int:
        """Number of experts of the largest MoE layer."""
        return max(self.moe.experts_by_layer or [self.moe.experts])

    @property
    def moe_size(self) -> str:
        """Number of experts of an MoE layer as text: one number, or the range over layers."""
        return " to ".join(str(count) for count in sorted({self.min_experts_per_layer, self.max_experts_per_layer}))

    @property
    def moe_layers(self) -> list[int]:
        """Indices of the MoE layers, also of those among the layers that predict further tokens."""
        return [layer for layer in range(self.trained_layers) if self.is_moe_layer(layer)]
