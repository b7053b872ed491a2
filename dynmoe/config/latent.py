"""Configuration of multi-head latent attention."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar, Optional

from dynmoe.errors import ConfigError
from dynmoe.fields import Section, option


@dataclass
class LatentConfig(Section):
    _section: ClassVar[str] = "model.latent"

    kv_lora_rank: Optional[int] = option(
        None, "width of the latent from which the keys and values of all heads are computed (multi-head latent "
        "attention, arXiv 2405.04434); null: attention as model.kv_heads describes", at_least=1,
    )  # fmt: skip
    q_lora_rank: Optional[int] = option(
        None, "width of the latent from which queries are computed; null: from the layer's input", at_least=1
    )
    qk_nope_head_dim: int = option(128, "width of the part of a query and key that is not rotated", at_least=1)
    qk_rope_head_dim: int = option(
        64, "width of the part that is rotated; its key is the same for all heads", at_least=2
    )  # fmt: skip
    v_head_dim: int = option(128, "width of a value, at most that of a key", at_least=1)
    scale_latents: bool = option(
        False, "multiply each normalized latent by the square root of model.hidden / its width (LongCat-Flash: "
        "mla_scale_q_lora, mla_scale_kv_lora)",
    )  # fmt: skip
    norm_eps: Optional[float] = option(None, "epsilon of the norms of the latents; null: model.norm_eps", above=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.enabled:
            for spec in fields(self):
                if (value := getattr(self, spec.name)) != spec.default:
                    cure = "set model.latent.kv_lora_rank, or remove it"
                    raise ConfigError(f"model.latent.{spec.name}", value, "attention has no latent", cure)
        if self.qk_rope_head_dim % 2:
            problem = "must be even for rotary position embedding"
            raise ConfigError("model.latent.qk_rope_head_dim", self.qk_rope_head_dim, problem, "use an even number")
        if self.v_head_dim > self.width_of_key:
            problem = f"exceeds the width of a key, qk_nope_head_dim + qk_rope_head_dim ({self.width_of_key})"
            raise ConfigError("model.latent.v_head_dim", self.v_head_dim, problem, "use a smaller number")

    @property
    def enabled(self) -> bool:
        return self.kv_lora_rank is not None

    @property
    def width_of_key(self) -> int:
        """Width of both parts of a query and key."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim
