"""Expert-threshold routing (arXiv 2603.11535): each expert lets in the tokens above a moving average of its own.

What an expert would take in expert choice, its k best tokens of a batch, is remembered as the score of the k-th of
them. A token then needs to know of no other token, in training or in inference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dynmoe.routing.plan import RoutingPlan
from dynmoe.routing.sigmoid import sigmoid_cutoff

# Scores lie in [0, 1]; counts of bins can be summed over ranks and micro-batches, the scores themselves cannot.
NUM_BINS = 2048


def expert_threshold(
    logits_TE: Tensor,
    cutoffs_E: Tensor,
    *,
    renormalize: bool = False,
) -> RoutingPlan:
    """Selects every expert whose sigmoid score exceeds that expert's cut-off; the gates are the scores.

    Args:
        logits_TE: router logits, any float dtype.
        cutoffs_E: fp32, the moving averages of :func:`move_cutoffs`.
        renormalize: make the gates of a token sum to 1.

    A token above no cut-off selects nobody: a floor or a ceiling would break the count that the cut-offs stand for.
    """
    return sigmoid_cutoff(logits_TE, cutoffs_E, renormalize=renormalize, min_experts=0)


@torch.no_grad()
def score_histogram(scores_TE: Tensor) -> Tensor:
    """Tokens by expert and bin of their score, int64 [E, NUM_BINS]."""
    num_experts = scores_TE.shape[1]
    # What is no number is told of elsewhere, with its layer and rank; here it counts as 0.
    bins_TE = (scores_TE.detach().nan_to_num(0.0) * NUM_BINS).long().clamp(max=NUM_BINS - 1)
    bins_TE += torch.arange(num_experts, device=scores_TE.device) * NUM_BINS
    # Not bincount, which waits for the device to know its size.
    counts = torch.zeros(num_experts * NUM_BINS, dtype=torch.int64, device=scores_TE.device)
    counts.scatter_add_(0, bins_TE.flatten(), torch.ones_like(bins_TE).flatten())
    return counts.view(num_experts, NUM_BINS)


def kth_largest(histogram_EB: Tensor, k: Tensor) -> Tensor:
    """Score of the k-th best token of each expert, fp64 [E], linear within its bin: exact to 1 / NUM_BINS.

    Args:
        histogram_EB: counts of :func:`score_histogram`, summed over whatever tokens are meant.
        k: how many tokens an expert is to take, a scalar; it need not be whole.
    """
    above_EB = histogram_EB.flip(1).cumsum(1).flip(1).double()  # tokens in this bin or a better one
    k = k.double().clamp(min=torch.finfo(torch.float64).tiny)
    place_E = (above_EB >= k).sum(dim=1).clamp(min=1) - 1  # the best bin with k tokens in it or above
    inside_E = histogram_EB.gather(1, place_E[:, None]).squeeze(1).double()
    better_E = above_EB.gather(1, place_E[:, None]).squeeze(1) - inside_E
    fraction_E = ((k - better_E) / inside_E.clamp(min=1)).clamp(0.0, 1.0)
    return (place_E + 1.0 - fraction_E) / NUM_BINS


def move_cutoffs(cutoffs_E: Tensor, kth_largest_E: Tensor, decay: float) -> Tensor:
    """c <- decay * c + (1 - decay) * (k-th largest score)."""
    return cutoffs_E * decay + kth_largest_E.to(cutoffs_E.dtype) * (1.0 - decay)
