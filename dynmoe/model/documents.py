"""Documents that do not see each other: places in them, and masks of causal attention.

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
    """The documents of a batch of sequences; each token attends to those of its own document up to itself.

    All layers share one instance, and with it the masks.

    Args:
        start_BS: place in the sequence at which each token's document starts, int64.
    """

    def __init__(self, start_BS: Tensor) -> None:
        self.start_BS = start_BS

    @property
    def place_BS(self) -> Tensor:
        """Place of each token in its document, int64."""
        return torch.arange(self.start_BS.shape[1], device=self.start_BS.device) - self.start_BS

    @cached_property
    def mask_B1QP(self) -> Tensor:
        """True where a position attends to another, bool."""
        place_P = torch.arange(self.start_BS.shape[1], device=self.start_BS.device)
        return ((place_P <= place_P[:, None]) & (place_P >= self.start_BS.unsqueeze(2))).unsqueeze(1)

    @cached_property
    def blocks(self) -> BlockMask:
        """The same mask for FlexAttention, made from the starts alone: a mask of all pairs is never in memory."""
        start_BS = self.start_BS
        length = start_BS.shape[1]
        device = start_BS.device

        def attends(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (key <= query) & (key >= start_BS[batch, query])

        first_I = torch.arange(0, length, _BLOCK, device=device)
        last_I = (first_I + _BLOCK).clamp(max=length) - 1
        first_J = first_I
        # Starts never fall along a sequence: those of the first and last query bound all of a block.
        lowest_BI, highest_BI = start_BS[:, first_I], start_BS[:, last_I]
        seen_BIJ = (first_J <= last_I[:, None]) & (first_J + _BLOCK > lowest_BI.unsqueeze(2))
        whole_BIJ = (first_J + _BLOCK <= first_I[:, None]) & (first_J >= highest_BI.unsqueeze(2))
        return BlockMask.from_kv_blocks(
            *_listed(seen_BIJ & ~whole_BIJ), *_listed(whole_BIJ), _BLOCK, attends, seq_lengths=(length, length)
        )


def _listed(chosen_BIJ: Tensor) -> tuple[Tensor, Tensor]:
    """Number and indices of the chosen key blocks of each query block, int32 [B, 1, I] and [B, 1, I, J]."""
    chosen_B1IJ = chosen_BIJ.unsqueeze(1).int()
    order_B1IJ = chosen_B1IJ.argsort(dim=-1, descending=True, stable=True)
    return chosen_B1IJ.sum(dim=-1, dtype=torch.int32), order_B1IJ.int()
