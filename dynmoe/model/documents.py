"""Which positions each position attends to: itself and those before it, within its document and a window.

Shape suffixes besides those of ``dynmoe.routing``: Q query positions, P key positions; I blocks of queries, J blocks of
keys.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

_BLOCK = 128  # positions of a block of FlexAttention


class Documents:
    """The documents of a batch of sequences, for attention in all layers, which share the masks.

    Args:
        start_BS: place in the sequence at which each token's document starts, int64; None: each sequence is one.
        length: positions of a sequence.
        device: of the masks.
    """

    def __init__(self, start_BS: Tensor | None, length: int, device: torch.device) -> None:
        self.start_BS = start_BS
        self._position_S = torch.arange(length, device=device)
        self._masks: dict[int | None, CausalMask] = {}

    @property
    def place_BS(self) -> Tensor | None:
        """Place of each token in its document, int64; None if that is its position."""
        return None if self.start_BS is None else self._position_S - self.start_BS

    def mask(self, window: int | None) -> CausalMask | None:
        """What each position attends to with a window; None if that is itself and everything before."""
        if window is not None and window >= len(self._position_S):
            window = None
        if self.start_BS is None and window is None:
            return None
        if window not in self._masks:
            start_BS = torch.zeros_like(self._position_S)[None] if self.start_BS is None else self.start_BS
            first_BS = start_BS if window is None else start_BS.maximum(self._position_S - (window - 1))
            self._masks[window] = CausalMask(first_BS)
        return self._masks[window]


class CausalMask:
    """Each position attends to consecutive ones, up to itself.

    Args:
        first_BS: first position that each attends to, int64, never falling along a sequence; B may be 1 for all.
    """

    def __init__(self, first_BS: Tensor) -> None:
        self._first_BS = first_BS

    @cached_property
    def mask_B1QP(self) -> Tensor:
        """True where a position attends to another, bool."""
        return self.rows(slice(None)).unsqueeze(1)

    def rows(self, queries: slice) -> Tensor:
        """True where these positions attend to another, bool [B, Q, P]."""
        place_P = torch.arange(self._first_BS.shape[1], device=self._first_BS.device)
        return (place_P <= place_P[queries, None]) & (place_P >= self._first_BS[:, queries, None])

    @cached_property
    def blocks(self) -> BlockMask:
        """The same mask for FlexAttention, made from first positions: a mask of all pairs is never in memory."""
        first_BS = self._first_BS
        batch, length = first_BS.shape
        device = first_BS.device

        def attends(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (key <= query) & (key >= first_BS[row if batch > 1 else 0, query])

        begin_I = torch.arange(0, length, _BLOCK, device=device)
        last_I = (begin_I + _BLOCK).clamp(max=length) - 1
        begin_J = begin_I
        # The first and last query of a block bound what all of them attend to.
        lowest_BI, highest_BI = first_BS[:, begin_I], first_BS[:, last_I]
        seen_BIJ = (begin_J <= last_I[:, None]) & (begin_J + _BLOCK > lowest_BI.unsqueeze(2))
        whole_BIJ = (begin_J + _BLOCK <= begin_I[:, None]) & (begin_J >= highest_BI.unsqueeze(2))
        return BlockMask.from_kv_blocks(
            *_listed(seen_BIJ & ~whole_BIJ), *_listed(whole_BIJ), _BLOCK, attends, seq_lengths=(length, length)
        )


def _listed(chosen_BIJ: Tensor) -> tuple[Tensor, Tensor]:
    """Number and indices of the chosen key blocks of each query block, int32 [B, 1, I] and [B, 1, I, J]."""
    chosen_B1IJ = chosen_BIJ.unsqueeze(1).int()
    order_B1IJ = chosen_B1IJ.argsort(dim=-1, descending=True, stable=True)
    return chosen_B1IJ.sum(dim=-1, dtype=torch.int32), order_B1IJ.int()
