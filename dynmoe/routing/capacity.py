"""Limits on the routes of one expert and of all tokens together, and the choice of the routes to drop."""

from __future__ import annotations

import torch
from torch import Tensor

from dynmoe.routing.plan import RoutingPlan
from dynmoe.routing.selection import rank_descending


def expert_capacity(num_routes: float | Tensor, num_active_experts: int | Tensor, factor: float) -> Tensor:
    """ceil(factor * routes / active experts), at least 1: an int64 scalar on the device of ``num_routes``.

    ``num_routes`` is the observed T * K, so the capacity follows a dynamic K (instead of T * k / E).

    Raises:
        ValueError: ``factor`` is not positive.
    """
    if factor <= 0:
        raise ValueError(f"factor={factor} must be positive")
    routes = torch.as_tensor(num_routes).double()
    active = torch.as_tensor(num_active_experts)
    return torch.ceil(factor * routes / active.to(routes.device)).clamp(min=1).long()


def apply_capacity(plan: RoutingPlan, capacity: int | Tensor, policy: str = "probs") -> RoutingPlan:
    """Drops the routes of each expert beyond ``capacity``.

    Args:
        plan: of the tokens of one rank.
        capacity: maximum number of routes of one expert (an int, or an int tensor of one element).
        policy: ``probs`` drops the lowest scores first (ties: the later token), ``position`` the last tokens first.

    Raises:
        ValueError: the policy is unknown.
    """
    map_TE = plan.routing_map_TE
    if policy == "position":
        place_TE = map_TE.cumsum(dim=0) - 1
    elif policy == "probs":
        # Scores are not negative, so -1 sorts experts without a route last.
        priority_TE = plan.scores_TE.detach().masked_fill(~map_TE, -1.0)
        order_TE = priority_TE.argsort(dim=0, descending=True, stable=True)
        places_TE = torch.arange(map_TE.shape[0], device=map_TE.device).unsqueeze(1).expand_as(order_TE)
        place_TE = torch.empty_like(order_TE).scatter_(0, order_TE, places_TE)
    else:
        raise ValueError(f"policy={policy!r} must be 'probs' or 'position'")
    return plan.mask(map_TE & (place_TE < capacity))


def limit_routes(plan: RoutingPlan, max_routes: int, policy: str = "probs") -> RoutingPlan:
    """Drops routes until at most ``max_routes`` remain, evenly: the worst expert of every token first.

    No token has a second expert before every token has its best one, and so on. If the remaining routes do not suffice
    for all experts of one rank, ``probs`` prefers the highest scores (ties: the earlier token), ``position`` the first
    tokens. ``plan`` is of the tokens of one rank.

    Raises:
        ValueError: the policy is unknown.
    """
    if policy not in ("probs", "position"):
        raise ValueError(f"policy={policy!r} must be 'probs' or 'position'")
    map_TE = plan.routing_map_TE
    # Scores are not negative, so -1 ranks experts without a route last.
    scores_TE = plan.scores_TE.detach().masked_fill(~map_TE, -1.0)
    rank_TE = rank_descending(scores_TE)
    ranks_E = torch.arange(map_TE.shape[1], device=map_TE.device)
    routes_E = (map_TE.sum(dim=1, keepdim=True) > ranks_E).sum(dim=0)  # by rank: best, second best, ...
    total_E = routes_E.cumsum(0)
    cut = (total_E <= max_routes).sum()  # the first rank of which not all routes fit
    left = max_routes - (routes_E * (ranks_E < cut)).sum()
    contested_TE = map_TE & (rank_TE == cut)
    if policy == "probs":
        order_T = scores_TE.masked_fill(~contested_TE, -1.0).amax(dim=1).argsort(descending=True, stable=True)
        place_T = torch.empty_like(order_T).scatter_(0, order_T, torch.arange(len(order_T), device=order_T.device))
    else:
        place_T = contested_TE.any(dim=1).cumsum(0) - 1
    return plan.mask(map_TE & ((rank_TE < cut) | (contested_TE & (place_T < left).unsqueeze(1))))
