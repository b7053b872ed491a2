"""What attention keeps of the tokens before, while a text is generated."""

from __future__ import annotations

import torch
from torch import Tensor


class LayerCache:
    """Keys and values of one layer at all positions so far, [B, K, P, d], and what the latest of them see.

    ``mask_B1SP`` is True where one of the latest positions sees one of all.
    """

    def __init__(self) -> None:
        self.mask_B1SP: Tensor | None = None
        self._kept: tuple[Tensor, Tensor] | None = None

    def extend(self, k_BKSd: Tensor, v_BKSd: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of all positions, once those of the latest are given."""
        new = (k_BKSd, v_BKSd)
        if self._kept is not None:
            new = (torch.cat([self._kept[0], k_BKSd], dim=2), torch.cat([self._kept[1], v_BKSd], dim=2))
        self._kept = new
        return new


class KeyValueCache:
    """The caches of all layers, for sequences that may begin with padding.

    Args:
        layers: of the decoder.
        padding_B: how many positions at the beginning of each sequence are padding.

    Attributes:
        layers: one cache for each.
        length: positions so far, padding included.
    """

    def __init__(self, layers: int, padding_B: Tensor) -> None:
        self.layers = [LayerCache() for _ in range(layers)]
        self.length = 0
        self._padding_B1 = padding_B[:, None]

    def advance(self, num_new: int) -> Tensor:
        """Makes room for the next tokens of each sequence; their positions in its text, [B, S] (padding: 0)."""
        place_P = torch.arange(self.length + num_new, device=self._padding_B1.device)
        place_S = place_P[self.length :]
        seen_BSP = (place_P <= place_S[:, None]) & (place_P >= self._padding_B1[:, None])
        # Padding sees itself, as a softmax over nothing is no number.
        mask_B1SP = (seen_BSP | (place_P == place_S[:, None])).unsqueeze(1)
        for layer in self.layers:
            layer.mask_B1SP = mask_B1SP
        self.length += num_new
        return (place_S - self._padding_B1).clamp(min=0)
