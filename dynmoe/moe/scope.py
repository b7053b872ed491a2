"""The tokens of a forward pass over all ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from dynmoe.moe.context import MoEGroups
from dynmoe.routing.scope import TokenScope


class RankScope(TokenScope):
    """The tokens of a forward pass, spread over the ranks of ``groups``; its methods are collective.

    Args:
        num_sequences: number of sequences of this rank; each may be split over the sequence group.
        groups: process groups of the MoE layers.
    """

    def __init__(self, num_sequences: int, groups: MoEGroups) -> None:
        super().__init__(num_sequences)
        self._groups = groups

    def sum(self, local: Tensor) -> Tensor:
        if self._groups.tokens is None:
            return local
        total = local.clone()
        dist.all_reduce(total, group=self._groups.tokens)
        return total

    def sequences(self, values_TE: Tensor) -> Tensor:
        own_BPE = super().sequences(values_TE)
        group = self._groups.sequence
        if group is None:
            return own_BPE
        parts = [torch.empty_like(own_BPE) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, own_BPE.contiguous(), group=group)
        return torch.cat(parts, dim=1)

    def own(self, values_BSE: Tensor) -> Tensor:
        group = self._groups.sequence
        if group is None:
            return super().own(values_BSE)
        return super().own(values_BSE.chunk(dist.get_world_size(group), dim=1)[dist.get_rank(group)])
