"""The cache of attention for text generation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_FEWEST_POSITIONS = 64

Tables = tuple[Tensor, Tensor]


class LayerCache:
    """What attention needs of all positions so far in one layer, in tensors with room for half as many more.

    Args:
        mask_B1SP: see :meth:`KeyValueCache.mask_B1SP`.
    """

    def __init__(self, mask_B1SP: Callable[[int | None], Tensor | None]) -> None:
        self.mask_B1SP = mask_B1SP
        self._length = 0
        self._room = 0
        self._kept: tuple[Tensor, ...] = ()

    def extend(self, *latest_BKSd: Tensor) -> tuple[Tensor, ...]:
        """Appends tensors of the latest positions, such as keys and values; returns those of all, [B, K, P, d]."""
        start = self._length
        end = self._length = start + latest_BKSd[0].shape[2]
        if end > self._room:
            self._room = max(_FEWEST_POSITIONS, end + end // 2)
            before = self._kept
            self._kept = tuple(new.new_empty(*new.shape[:2], self._room, new.shape[3]) for new in latest_BKSd)
            for kept, old in zip(self._kept, before, strict=False):  # no old ones at first
                kept[:, :, :start] = old[:, :, :start]
        for kept, new in zip(self._kept, latest_BKSd, strict=True):
            kept[:, :, start:end] = new
        return tuple(kept[:, :, :end] for kept in self._kept)


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
        self.layers = [LayerCache(self.mask_B1SP) for _ in range(layers)]
        self.length = 0
        self._start = 0
        self._masks: dict[int | None, Tensor | None] = {}
        self._padding_B1 = padding_B[:, None] if bool(padding_B.any()) else None
        self._device = padding_B.device
        self._tables: Tables | None = None

    def advance(self, num_new: int, make_tables: Callable[[int], Tables]) -> Tables:
        """Adds ``num_new`` positions to each sequence; returns the rows of rotary tables at their places in the text.

        Args:
            num_new: number of positions, S.
            make_tables: makes tables for a number of positions; called again when they are too short.

        Returns:
            Tables for all sequences, [S, d], or if there is padding, [B, 1, S, d].
        """
        start = self._start = self.length
        end = self.length = start + num_new
        self._masks = {}
        if self._tables is None or end > len(self._tables[0]):
            self._tables = make_tables(max(_FEWEST_POSITIONS, end + end // 2))
        if self._padding_B1 is None:
            cos_Pd, sin_Pd = self._tables
            return cos_Pd[start:end], sin_Pd[start:end]
        place_BS = (torch.arange(start, end, device=self._device) - self._padding_B1).clamp(min=0)  # padding: 0
        cos_BSd, sin_BSd = (table_Pd[place_BS] for table_Pd in self._tables)
        return cos_BSd.unsqueeze(1), sin_BSd.unsqueeze(1)

    def mask_B1SP(self, window: int | None) -> Tensor | None:
        """True where one of the S latest positions attends to one of all P; None if to all up to itself."""
        if window is not None and window >= self.length:
            window = None
        if window not in self._masks:
            self._masks[window] = self._mask(self._start, self.length, window)
        return self._masks[window]

    def _mask(self, start: int, end: int, window: int | None) -> Tensor | None:
        if self._padding_B1 is None and window is None and (start == 0 or end == start + 1):
            return None
        place_P = torch.arange(end, device=self._device)
        place_S1 = place_P[start:, None]
        seen_SP = place_P <= place_S1
        if window is not None:
            seen_SP &= place_P > place_S1 - window
        if self._padding_B1 is None:
            return seen_SP[None, None]
        real_B1P = (place_P >= self._padding_B1).unsqueeze(1)
        # Padding attends to itself, as a softmax over no positions is NaN.
        return (seen_SP & real_B1P | (place_P == place_S1)).unsqueeze(1)
