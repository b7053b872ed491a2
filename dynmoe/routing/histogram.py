"""Histograms by expert. Counts of bins can be summed over ranks and micro-batches, the values themselves cannot."""

from __future__ import annotations

import math

import torch
from torch import Tensor

NUM_BINS = 2048
# Distances from 1e-6 to 1e4 are told apart, whatever the scale of the values.
_NEAREST = 1e-6
_E_FOLDS = math.log1p(1e4 / _NEAREST)


@torch.no_grad()
def score_histogram(scores_TE: Tensor, num_bins: int = NUM_BINS) -> Tensor:
    """Number of tokens by expert and bin of their score, which lies in [0, 1]; int64 [E, num_bins]."""
    num_experts = scores_TE.shape[1]
    # NaN counts as 0 here. The engine reports it, with its layer and rank.
    bins_TE = (scores_TE.detach().nan_to_num(0.0) * num_bins).long().clamp(max=num_bins - 1)
    bins_TE += torch.arange(num_experts, device=scores_TE.device) * num_bins
    # bincount would wait for the device.
    counts = torch.zeros(num_experts * num_bins, dtype=torch.int64, device=scores_TE.device)
    counts.scatter_add_(0, bins_TE.flatten(), torch.ones_like(bins_TE).flatten())
    return counts.view(num_experts, num_bins)


def kth_largest(histogram_EC: Tensor, k: Tensor) -> Tensor:
    """Score of the k-th best token of each expert, fp64 [E], linear within its bin: exact to the width of a bin.

    Args:
        histogram_EC: sum of :func:`score_histogram` over all tokens.
        k: number of tokens that an expert takes, a scalar or [E]; may be fractional.
    """
    above_EC = histogram_EC.flip(1).cumsum(1).flip(1).double()  # tokens in this bin or a better one
    k = k.double().clamp(min=torch.finfo(torch.float64).tiny)
    enough_EC = above_EC >= k[..., None]
    place_E = enough_EC.sum(dim=1).clamp(min=1) - 1  # the best bin with k tokens in it or in better ones
    inside_E = histogram_EC.gather(1, place_E[:, None]).squeeze(1).double()
    better_E = above_EC.gather(1, place_E[:, None]).squeeze(1) - inside_E
    fraction_E = ((k - better_E) / inside_E.clamp(min=1)).clamp(0.0, 1.0)
    return (place_E + 1.0 - fraction_E) / histogram_EC.shape[1]


def log_places(distances_TE: Tensor) -> Tensor:
    """Maps signed distances to [0, 1] for :func:`score_histogram`, 0 to 1/2; fp32.

    On a logarithmic scale, so the width of a bin is in proportion to the distance: values close to the last step's
    quantile, among which the next one is, are told apart best. With C bins, the ratio of neighbors is exp(46 / C).
    """
    folds_TE = torch.log1p(distances_TE.detach().float().abs() / _NEAREST)
    return (0.5 + 0.5 / _E_FOLDS * distances_TE.detach().sign() * folds_TE).clamp(0.0, 1.0)


def distances_at(places_E: Tensor) -> Tensor:
    """The inverse of :func:`log_places`, fp64."""
    signed_E = (places_E.double() - 0.5) * (2 * _E_FOLDS)
    return signed_E.sign() * torch.expm1(signed_E.abs()) * _NEAREST


def move_cutoffs(cutoffs_E: Tensor, kth_largest_E: Tensor, decay: float) -> Tensor:
    """c <- decay * c + (1 - decay) * (k-th largest score)."""
    return cutoffs_E * decay + kth_largest_E.to(cutoffs_E.dtype) * (1.0 - decay)
