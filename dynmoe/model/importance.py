"""The importance of tokens in the attention of a layer, for routers that depend on it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dynmoe.model.documents import CausalMask

_ROWS = 512  # queries at a time: the weights of all pairs are never held together


@torch.no_grad()
def own_weights(q_BHSd: Tensor, k_BKPd: Tensor, mask: Tensor | CausalMask | None = None) -> Tensor:
    """Attention weight of each position on itself, relative to a uniform one, summed over heads, fp32 [B, S].

    Args:
        q_BHSd: queries of the latest S of P positions.
        k_BKPd: keys of all positions; each serves H / K heads.
        mask: True where a position attends to another, [B, 1, S, P], or a causal mask; None: to all up to itself.
    """
    batch, heads, positions, width = q_BHSd.shape
    kv_heads, length = k_BKPd.shape[1:3]
    places = torch.arange(length, device=q_BHSd.device)
    keys = k_BKPd.float().unsqueeze(2).transpose(-1, -2)
    queries = q_BHSd.float().unflatten(1, (kv_heads, heads // kv_heads))
    parts = []
    for start in range(0, positions, _ROWS):
        rows = slice(start, min(start + _ROWS, positions))
        own = places[length - positions :][rows]
        if isinstance(mask, CausalMask):
            seen = mask.rows(rows)
        else:
            seen = (places <= own[:, None]).unsqueeze(0) if mask is None else mask[:, 0, rows]
        scores = queries[:, :, :, rows] @ keys / math.sqrt(width)
        weights = scores.masked_fill(~seen[:, None, None], -torch.inf).softmax(dim=-1)
        at = own.view(1, 1, 1, -1, 1).expand(*weights.shape[:4], 1)
        parts.append(weights.gather(-1, at).squeeze(-1).sum(dim=(1, 2)) * seen.sum(dim=-1))
    return torch.cat(parts, dim=1) if parts else q_BHSd.new_zeros(batch, 0, dtype=torch.float32)


def importance(own_weights_BS: Tensor, heads: int) -> Tensor:
    """log(1 + (e - 1) w), fp32 [B, S], w the mean of :func:`own_weights` over ``heads``: 1 for uniform attention.

    The logarithm keeps it comparable over positions: a weight that does not fall with the position exceeds the uniform
    one a thousandfold after a thousand tokens.
    """
    return torch.log1p(own_weights_BS / heads * (math.e - 1.0))
