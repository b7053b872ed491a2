"""The decoder as PyTorch modules, independent of engines."""

from dynmoe.model.decoder import Decoder
from dynmoe.model.size import ModelSize

__all__ = ["Decoder", "ModelSize"]
