"""What the routers share: ranks of scores, limits of K, and the plan of a softmax router."""

from __future__ import annotations

import torch
from torch import Tensor

from dynmoe.routing.plan import RoutingPlan


def rank_descending(scores_TE: Tensor) -> Tensor:
    """Rank of each expert within its token, int64 [T, E]; 0 is the best, ties go to the lower expert index."""
    order_TE = scores_TE.argsort(dim=1, descending=True, stable=True)
    ranks_TE = torch.arange(scores_TE.shape[1], device=scores_TE.device).expand_as(order_TE)
    return torch.empty_like(order_TE).scatter_(1, order_TE, ranks_TE)


def limit_experts(map_TE: Tensor, rank_TE: Tensor, min_experts: int, max_experts: int | None) -> Tensor:
    """Adds the best-ranked experts up to ``min_experts`` and keeps the best-ranked ``max_experts`` of a token."""
    if min_experts > 0:
        map_TE = map_TE | (rank_TE < min_experts)
    if max_experts is not None:
        map_TE = map_TE & (rank_TE < max_experts)
    return map_TE


def softmax_plan(logits_TE: Tensor, probs_TE: Tensor, map_TE: Tensor, renormalize: bool) -> RoutingPlan:
    """A plan whose gates are the probabilities of the chosen experts, raw or made to sum to 1."""
    gates_TE = probs_TE.masked_fill(~map_TE, 0.0)
    if renormalize:
        gates_TE = gates_TE / gates_TE.sum(dim=1, keepdim=True)
    return RoutingPlan(gates_TE, map_TE, map_TE, probs_TE, logits_TE)
