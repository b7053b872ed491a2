"""The tokens that a loss is averaged over, when some labels do not count."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from dynmoe.config import DataConfig
from dynmoe.config.constants import IGNORED
from dynmoe.data.batches import Batch

_FEW = 1e-6  # a text may have no label so far ahead; the sum of losses is then 0


def counts_BS(labels_BS: Tensor) -> Tensor:
    """1 where a label counts, 0 where it is ignored, fp32."""
    return (labels_BS != IGNORED).float()


def tokens_of_pass(batches: Sequence[Batch], data: DataConfig, device: torch.device) -> Tensor | None:
    """Labels that count in a forward pass, averaged over the passes of all ranks in a step; None if all labels count.

    Every pass divides its sum of losses by this number, and the mean over passes and ranks is then the mean over
    tokens, however they are spread. Collective, unless it returns None.

    Args:
        batches: those of this rank.
        data: settings of the data.
        device: of the model.

    Returns:
        The number for the next tokens, and for those of each depth of ``Batch.ahead``, fp32 [1 + M].
    """
    if not data.ignores_labels and not batches[0].ahead:
        return None
    counts = [[counts_BS(own.labels_BS).sum() for own in (batch, *batch.ahead)] for batch in batches]
    counted = torch.stack([torch.stack(own) for own in counts]).mean(dim=0).to(device)
    dist.all_reduce(counted)
    return counted.clamp(min=_FEW) / dist.get_world_size()


class TextLosses:
    """Sums the losses of several texts.

    Args:
        num_texts: number of texts, X.
    """

    def __init__(self, num_texts: int, device: torch.device) -> None:
        self._sums_X2 = torch.zeros(num_texts, 2, dtype=torch.float64, device=device)

    def add(self, text: int, mean: Tensor, labels_BS: Tensor) -> None:
        """Adds a batch of a text, given the mean loss of the labels that count."""
        count = counts_BS(labels_BS).sum()
        self._sums_X2[text] += torch.stack([mean * count, count])

    def means(self) -> list[float]:
        """The mean loss of each text over the tokens of all ranks. Collective."""
        dist.all_reduce(self._sums_X2)
        return (self._sums_X2[:, 0] / self._sums_X2[:, 1]).tolist()
