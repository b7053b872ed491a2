"""Expert-threshold routing (arXiv 2603.11535): each expert takes the tokens whose score exceeds its own cut-off.

In expert choice, an expert takes the k best tokens of a batch. Here its cut-off is a moving average of the score of the
k-th best one, so the choice for a token depends on no other token, in training or in inference.
"""

from __future__ import annotations

from torch import Tensor

from dynmoe.routing.plan import RoutingPlan
from dynmoe.routing.sigmoid import sigmoid_cutoff


def expert_threshold(logits_TE: Tensor, cutoffs_E: Tensor, *, renormalize: bool = False) -> RoutingPlan:
    """Selects every expert whose sigmoid score exceeds its cut-off; the gates are the scores.

    A token above no cut-off selects no expert: a floor or ceiling would change the number of tokens that an expert
    takes at its cut-off.

    Args:
        logits_TE: router logits, any float dtype.
        cutoffs_E: fp32, the moving averages of :func:`dynmoe.routing.histogram.move_cutoffs`.
        renormalize: make the gates of a token sum to 1.
    """
    return sigmoid_cutoff(logits_TE, cutoffs_E, renormalize=renormalize, min_experts=0)
