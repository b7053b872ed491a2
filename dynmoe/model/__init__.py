"""The decoder as plain PyTorch modules; no engine is known here."""

from dynmoe.model.decoder import Decoder
from dynmoe.model.size import ModelSize

__all__ = ["Decoder", "ModelSize"]
