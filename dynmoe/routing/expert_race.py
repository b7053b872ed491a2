"""Expert Race (arXiv 2503.16057): the best (token, expert) pairs of the whole batch."""

from __future__ import annotations

import torch
from torch import Tensor

from dynmoe.routing.plan import RoutingPlan


def race_plan(logits_TE: Tensor, map_TE: Tensor) -> RoutingPlan:
    """A plan whose gates are the logits of the selected experts (identity gating); the scores are their softmax."""
    return RoutingPlan(logits_TE.masked_fill(~map_TE, 0.0), map_TE, map_TE, logits_TE.softmax(dim=1), logits_TE)


def selected_together(map_TE: Tensor) -> Tensor:
    """Number of tokens that selected each pair of experts, fp32 [E, E]."""
    chosen_TE = map_TE.float()
    return chosen_TE.t() @ chosen_TE


def router_similarity(scores_TE: Tensor, together_EE: Tensor) -> Tensor:
    """Sum over pairs of experts of W_ij (P^T P)_ij / T, P the scores (section 5).

    W is :func:`selected_together`, its diagonal and the rest each scaled to a mean of 1. The diagonal balances the
    load, the rest repels experts that are often selected together. The loss is 1 for uniform scores: public versions
    of it are scaled differently, and this scale is our choice.

    Args:
        scores_TE: of this rank's tokens, with gradients.
        together_EE: summed over all tokens; a constant.
    """
    num_experts = together_EE.shape[0]
    diagonal_EE = torch.eye(num_experts, dtype=torch.bool, device=together_EE.device)
    own_EE = together_EE * diagonal_EE
    other_EE = together_EE * ~diagonal_EE
    weights_EE = own_EE * (num_experts / own_EE.sum().clamp(min=1))
    weights_EE = weights_EE + other_EE * (num_experts * (num_experts - 1) / other_EE.sum().clamp(min=1))
    return (weights_EE * (scores_TE.t() @ scores_TE)).sum() / max(scores_TE.shape[0], 1)
