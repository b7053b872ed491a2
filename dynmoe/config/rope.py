"""Configuration of rotary positions in contexts longer than those of the first training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Optional

from dynmoe.errors import ConfigError
from dynmoe.fields import Section, option


@dataclass
class RopeScalingConfig(Section):
    _section: ClassVar[str] = "model.rope_scaling"

    kind: Optional[str] = option(
        None, "how rotary positions are stretched to longer contexts: linear (all alike), yarn (arXiv 2309.00071), or "
        "llama3 (as Llama 3.1); null: not at all", choices=("linear", "yarn", "llama3"),
    )  # fmt: skip
    factor: float = option(1.0, "longest wanted context relative to original_length", at_least=1)
    original_length: Optional[int] = option(
        None, "context length of the first training, which yarn and llama3 need", at_least=1
    )  # fmt: skip
    beta_fast: float = option(32.0, "yarn: frequencies with more turns in original_length stay as they are", above=0)
    beta_slow: float = option(1.0, "yarn: frequencies with fewer turns are stretched by the whole factor", above=0)
    truncate: bool = option(True, "yarn: round the bounds between these frequencies to whole dimensions")
    attention_factor: Optional[float] = option(
        None, "yarn: factor of rotated queries and keys; with model.latent also of their parts that are not rotated "
        "(mscale_all_dim of DeepSeek-V2); null: 0.1 ln(factor) + 1", above=0,
    )  # fmt: skip
    low_freq_factor: float = option(
        1.0, "llama3: wavelengths above original_length / this are stretched by the whole factor", above=0
    )
    high_freq_factor: float = option(4.0, "llama3: wavelengths below original_length / this stay as they are", above=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind is None:
            if self.factor != 1:
                cure = "set model.rope_scaling.kind, or use 1"
                raise ConfigError("model.rope_scaling.factor", self.factor, "positions are not scaled", cure)
            return
        if self.kind != "linear" and self.original_length is None:
            cure = "use the sequence length of the first training"
            raise ConfigError("model.rope_scaling.original_length", None, f"{self.kind} needs it", cure)
        for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
            if getattr(self, low) >= getattr(self, high):
                problem = f"is not below {high} ({getattr(self, high):g})"
                raise ConfigError(f"model.rope_scaling.{low}", getattr(self, low), problem, "use a smaller number")

    @property
    def query_key_scale(self) -> float:
        """Factor of queries and keys, resolved from ``attention_factor``."""
        if self.kind != "yarn":
            return 1.0
        return 0.1 * math.log(self.factor) + 1.0 if self.attention_factor is None else self.attention_factor
