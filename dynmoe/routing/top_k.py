"""Top-k: a fixed number of experts per token, the baseline of the dynamic routers."""

from __future__ import annotations

import torch
from torch import Tensor

from dynmoe.routing.plan import RoutingPlan
from dynmoe.routing.selection import rank_descending, softmax_plan


def top_k(logits_TE: Tensor, k: int, *, renormalize: bool = False, bias_E: Tensor | None = None) -> RoutingPlan:
    """Selects the ``k`` experts of highest probability.

    Args:
        logits_TE: router logits, any float dtype; the softmax is in fp32.
        k: experts per token, 1 to E. Ties go to the lower expert index.
        renormalize: make the gates of a token sum to 1.
        bias_E: added to the probabilities for the selection, not for the gates (loss-free balancing, arXiv 2408.15664,
            eq. 3).

    Raises:
        ValueError: ``k`` is not between 1 and E.
    """
    num_experts = logits_TE.shape[1]
    if not 1 <= k <= num_experts:
        raise ValueError(f"k={k} must be between 1 and the number of experts ({num_experts})")
    logits_TE = logits_TE.float()
    probs_TE = torch.softmax(logits_TE, dim=1)
    ranked_TE = probs_TE if bias_E is None else probs_TE.detach() + bias_E
    return softmax_plan(logits_TE, probs_TE, rank_descending(ranked_TE) < k, renormalize)
