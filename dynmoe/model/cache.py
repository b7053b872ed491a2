"""The key-value cache for text generation."""

from __future__ import annotations

import torch
from torch import Tensor


class LayerCache:
    """Keys and values of one layer at all positions so far, [B, K, P, d].

    ``mask_B1SP`` is True where one of the S latest positions attends to one of all P positions.
    """

    def __init__(self) -> None:
        self.mask_B1SP: Tensor | None = None
        self._kept: tuple[Tensor, Tensor] | None = None

    def extend(self, k_BKSd: Tensor, v_BKSd: Tensor) -> tuple[Tensor, Tensor]:
        """Appends keys and values of the latest positions; returns those of all positions."""
        new = (k_BKSd, v_BKSd)
        if self._kept is not None:
            new = (torch.cat([self._kept[0], k_BKSd], dim=2), torch.cat([self._kept[1], v_BKSd], dim=2))
        self._kept = new
        return new


class KeyValueCache:
    """The caches of all layers, for sequences that may be padded on the left.

    Args:
        layers: number of layers of the decoder.
        padding_B: number of padding positions of each sequence.

    Attributes:
        layers: one cache for each layer.
        length: number of positions so far, including padding.
    """

    def __init__(self, layers: int, padding_B: Tensor) -> None:
        self.layers = [LayerCache() for _ in range(layers)]
        self.length = 0
        self._padding_B1 = padding_B[:, None]

    def advance(self, num_new: int) -> Tensor:
        """Adds ``num_new`` positions to each sequence; returns their positions in the text, [B, S] (padding: 0)."""
        place_P = torch.arange(self.length + num_new, device=self._padding_B1.device)
        place_S = place_P[self.length :]
        seen_BSP = (place_P <= place_S[:, None]) & (place_P >= self._padding_B1[:, None])
        # Padding attends to itself, as a softmax over no positions is NaN.
        mask_B1SP = (seen_BSP | (place_P == place_S[:, None])).unsqueeze(1)
        for layer in self.layers:
            layer.mask_B1SP = mask_B1SP
        self.length += num_new
        return (place_S - self._padding_B1).clamp(min=0)
