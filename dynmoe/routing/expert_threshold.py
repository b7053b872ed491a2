"""Expert-threshold routing (arXiv 2603.11535): each expert takes the tokens whose score exceeds its own cut-off.

In expert choice, an expert takes the k best tokens of a batch. Here its cut-off is a moving average of the score of the
k-th best one, so the choice for a token depends on no other token, in training or in inference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dynmoe.routing.plan import RoutingPlan
from dynmoe.routing.sigmoid import sigmoid_cutoff

# Scores lie in [0, 1]; counts of bins can be summed over ranks and micro-batches, the scores themselves cannot.
NUM_BINS = 2048


def expert_threshold(logits_TE: Tensor, cutoffs_E: Tensor, *, renormalize: bool = False) -> RoutingPlan:
    """Selects every expert whose sigmoid score exceeds its cut-off; the gates are the scores.

    A token above no cut-off selects no expert: a floor or ceiling would change the number of tokens that an expert
    takes at its cut-off.

    Args:
        logits_TE: router logits, any float dtype.
        cutoffs_E: fp32, the moving averages of :func:`move_cutoffs`.
        renormalize: make the gates of a token sum to 1.
    """
    return sigmoid_cutoff(logits_TE, cutoffs_E, renormalize=renormalize, min_experts=0)


@torch.no_grad()
def score_histogram(scores_TE: Tensor) -> Tensor:
    """Number of tokens by expert and bin of their score, int64 [E, NUM_BINS]."""
    num_experts = scores_TE.shape[1]
    # NaN counts as 0 here. The engine reports it, with its layer and rank.
    bins_TE = (scores_TE.detach().nan_to_num(0.0) * NUM_BINS).long().clamp(max=NUM_BINS - 1)
    bins_TE += torch.arange(num_experts, device=scores_TE.device) * NUM_BINS
    # bincount would wait for the device.
    counts = torch.zeros(num_experts * NUM_BINS, dtype=torch.int64, device=scores_TE.device)
    counts.scatter_add_(0, bins_TE.flatten(), torch.ones_like(bins_TE).flatten())
    return counts.view(num_experts, NUM_BINS)


def kth_largest(histogram_EC: Tensor, k: Tensor) -> Tensor:
    """Score of the k-th best token of each expert, fp64 [E], linear within its bin: exact to 1 / NUM_BINS.

    Args:
        histogram_EC: sum of :func:`score_histogram` over all tokens.
        k: number of tokens that an expert takes, a scalar or [E]; may be fractional.
    """
    above_EC = histogram_EC.flip(1).cumsum(1).flip(1).double()  # tokens in this bin or a better one
    k = k.double().clamp(min=torch.finfo(torch.float64).tiny)
    place_E = (above_EC >= k[..., None]).sum(dim=1).clamp(
        min=1
    ) - 1  # the best bin with k tokens in it or in better ones
    inside_E = histogram_EC.gather(1, place_E[:, None]).squeeze(1).double()
    better_E = above_EC.gather(1, place_E[:, None]).squeeze(1) - inside_E
    fraction_E = ((k - better_E) / inside_E.clamp(min=1)).clamp(0.0, 1.0)
    return (place_E + 1.0 - fraction_E) / NUM_BINS


def move_cutoffs(cutoffs_E: Tensor, kth_largest_E: Tensor, decay: float) -> Tensor:
    """c <- decay * c + (1 - decay) * (k-th largest score)."""
    return cutoffs_E * decay + kth_largest_E.to(cutoffs_E.dtype) * (1.0 - decay)
