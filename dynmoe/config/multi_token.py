"""Configuration of multi-token prediction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dynmoe.fields import Section, option


@dataclass
class MultiTokenConfig(Section):
    _section: ClassVar[str] = "model.mtp"

    layers: int = option(
        0, "layers behind the last one that predict further tokens in training: the first one the token after the next "
        "(multi-token prediction, arXiv 2412.19437); 0: none", at_least=0, at_most=100,
    )  # fmt: skip
    loss_weight: float = option(
        0.3, "weight of their loss, averaged over these layers (DeepSeek-V3: 0.3, later 0.1)", above=0
    )
