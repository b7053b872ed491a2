"""Thresholds from observed scores, identical on every rank."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

_HALVINGS = 40  # more than fp32 has bits


@torch.no_grad()
def thresholds_for_share(values_TE: Tensor, share: float, group: dist.ProcessGroup | None) -> Tensor:
    """For each expert, the lowest threshold that at most ``share`` of the tokens of all ranks exceed, fp32 [E].

    Bisects on counts, so each round all-reduces E numbers whatever the number of tokens. Collective over ``group``.
    """

    def all_reduce(tensor: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        if group is not None:
            dist.all_reduce(tensor, op=op, group=group)
        return tensor

    num_tokens = all_reduce(torch.tensor(float(values_TE.shape[0]), device=values_TE.device))
    low_E = all_reduce(values_TE.amin(dim=0), dist.ReduceOp.MIN)
    high_E = all_reduce(values_TE.amax(dim=0), dist.ReduceOp.MAX)
    low_E = low_E - torch.finfo(torch.float32).eps * (1.0 + low_E.abs())  # all values exceed it
    for _ in range(_HALVINGS):
        middle_E = (low_E + high_E) / 2
        exceed_E = all_reduce((values_TE > middle_E).sum(dim=0).float())
        too_low_E = exceed_E > share * num_tokens
        low_E = torch.where(too_low_E, middle_E, low_E)
        high_E = torch.where(too_low_E, high_E, middle_E)
    return high_E
