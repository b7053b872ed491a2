"""Selection among all (token, expert) pairs of a pool of tokens: of each sequence, or of the batch of all ranks.

A pair competes with a strength between 0 and 1. The pool's best pairs are selected, so the number of experts of a token
depends on the other tokens. That looks ahead: it is for training. In evaluation, a pair is selected if its strength
exceeds a cut-off that training has recorded (:func:`pool_cutoff`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dynmoe.routing.histogram import kth_largest
from dynmoe.routing.scope import TokenScope
from dynmoe.routing.selection import rank_descending

_ROUND_BITS = 10
_TINY = torch.finfo(torch.float32).tiny


def odds_of_uniform(probs_TE: Tensor) -> Tensor:
    """p / (p + 1/E): 1/2 for the uniform probability. The same resolution in a histogram for any number of experts."""
    scaled_TE = probs_TE * probs_TE.shape[1]
    return scaled_TE / (scaled_TE + 1.0)


def squeezed(logits_TE: Tensor) -> Tensor:
    """(1 + x / (1 + |x|)) / 2: 1/2 for a logit of 0. It keeps large logits apart, which a sigmoid rounds to 1."""
    return 0.5 + 0.5 * logits_TE / (1.0 + logits_TE.abs())


def contested(strength_TE: Tensor, min_experts: int, max_experts: int | None) -> Tensor:
    """The strengths with which pairs compete: 1 for the best ``min_experts`` of a token, 0 beyond ``max_experts``."""
    strength_TE = strength_TE.detach().clamp(min=_TINY)
    if min_experts == 0 and max_experts is None:
        return strength_TE
    rank_TE = rank_descending(strength_TE)
    strength_TE = strength_TE.masked_fill(rank_TE < min_experts, 1.0)
    return strength_TE if max_experts is None else strength_TE.masked_fill(rank_TE >= max_experts, 0.0)


def best_pairs(values_BN: Tensor, count: int) -> Tensor:
    """Mask of the ``count`` largest values of each row; ties go to the earlier one."""
    order_BN = values_BN.sort(dim=1, descending=True, stable=True).indices
    return torch.zeros_like(values_BN, dtype=torch.bool).scatter_(1, order_BN[:, :count], True)


def best_of_sequences(values_TE: Tensor, experts_per_token: float, scope: TokenScope) -> Tensor:
    """Mask of the round(S * K) largest positive values of each sequence, bool [T, E]; ties go to the earlier token."""
    values_BSE = scope.sequences(values_TE)
    count = round(values_BSE.shape[1] * experts_per_token)
    return scope.own(best_pairs(values_BSE.flatten(1), count).view_as(values_BSE)) & (values_TE > 0)


def best_of_batch(values_TE: Tensor, experts_per_token: float, scope: TokenScope) -> Tensor:
    """Mask of the round(T * K) largest positive values over all ranks, bool [T, E]; also those equal to the last one.

    Exact. It takes three all-reduces of 1,024 counts, whatever the number of tokens and experts: floats that are not
    negative are ordered like their bits, and each round finds ten more bits of the last value from a histogram.
    """
    num_experts = values_TE.shape[1]
    bits = values_TE.detach().contiguous().view(torch.int32).flatten()
    last = torch.zeros(1, dtype=torch.int32, device=bits.device)
    wanted = None
    for shift in (2 * _ROUND_BITS, _ROUND_BITS, 0):
        counted = (bits >> (shift + _ROUND_BITS)) == last
        places = ((bits >> shift) & ((1 << _ROUND_BITS) - 1)).long()
        counts = torch.zeros(1 << _ROUND_BITS, dtype=torch.int64, device=bits.device)
        counts = scope.sum(counts.scatter_add_(0, places, counted.long()))
        above = counts.flip(0).cumsum(0).flip(0)  # pairs with these bits or higher ones
        if wanted is None:
            wanted = (above[:1].double() / num_experts * experts_per_token).round().long()
        place = (above >= wanted).sum().view(1) - 1
        wanted = wanted - (above - counts).gather(0, place)
        last = (last << _ROUND_BITS) | place.int()
    return (values_TE >= last.view(torch.float32)) & (values_TE > 0)


def pool_cutoff(histogram_EC: Tensor, routes: Tensor) -> Tensor:
    """The cut-off that the ``routes`` strongest pairs exceed, an fp32 scalar, from their histogram."""
    return kth_largest(histogram_EC.sum(dim=0, keepdim=True), routes)[0].float()


def passing(values_TE: Tensor, cutoff: Tensor) -> Tensor:
    """Mask of the pairs that exceed the cut-off; while it is not known (0), of those above 1/2."""
    return values_TE > torch.where(cutoff > 0, cutoff, 0.5)
