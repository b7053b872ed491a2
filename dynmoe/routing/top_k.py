"""Top-k: the fixed number of experts per token that the dynamic routers are measured against."""

from __future__ import annotations

import torch
from torch import Tensor

from dynmoe.routing.plan import RoutingPlan
from dynmoe.routing.selection import rank_descending, softmax_plan


def top_k(logits_TE: Tensor, k: int, *, renormalize: bool = False) -> RoutingPlan:
    """Selects the ``k`` experts of highest probability.

    Args:
        logits_TE: router logits, any float dtype; the softmax is taken in fp32.
        k: experts per token, 1 to E. Ties go to the lower expert index.
        renormalize: make the gates of a token sum to 1.

    Raises:
        ValueError: ``k`` outside 1 to E.
    """
    num_experts = logits_TE.shape[1]
    if not 1 <= k <= num_experts:
        raise ValueError(f"k={k} must lie between 1 and the number of experts ({num_experts})")
    logits_TE = logits_TE.float()
    probs_TE = torch.softmax(logits_TE, dim=1)
    map_TE = rank_descending(probs_TE) < k
    return softmax_plan(logits_TE, probs_TE, map_TE, renormalize)
