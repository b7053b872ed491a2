"""A limit on the routes of one expert, and which routes go when it is passed."""

from __future__ import annotations

import torch
from torch import Tensor

from dynmoe.routing.plan import RoutingPlan


def expert_capacity(num_routes: float | Tensor, num_active_experts: int | Tensor, factor: float) -> Tensor:
    """ceil(factor * routes / active experts), at least 1; an int64 scalar, on the device of what is given.

    ``num_routes`` is T * K as observed, so that the limit follows a dynamic K (in place of T * k / E).

    Raises:
        ValueError: a factor that is not positive.
    """
    if factor <= 0:
        raise ValueError(f"factor={factor} must be positive")
    routes, active = torch.as_tensor(num_routes).double(), torch.as_tensor(num_active_experts)
    return torch.ceil(factor * routes / active.to(routes.device)).clamp(min=1).long()


def apply_capacity(plan: RoutingPlan, capacity: int | Tensor, policy: str = "probs") -> RoutingPlan:
    """Drops the routes of each expert beyond ``capacity``.

    Args:
        plan: the selection; its tokens are one rank's.
        capacity: routes that one expert may keep (an int, or an int tensor of one element).
        policy: ``probs`` drops the lowest scores first (ties: the later token), ``position`` the last tokens first.

    Raises:
        ValueError: an unknown policy.
    """
    map_TE = plan.routing_map_TE
    if policy == "position":
        place_TE = map_TE.cumsum(dim=0) - 1
    elif policy == "probs":
        # Scores are not negative, so -1 sorts the routes that do not exist behind all that do.
        priority_TE = plan.scores_TE.detach().masked_fill(~map_TE, -1.0)
        order_TE = priority_TE.argsort(dim=0, descending=True, stable=True)
        places_TE = torch.arange(map_TE.shape[0], device=map_TE.device).unsqueeze(1).expand_as(order_TE)
        place_TE = torch.empty_like(order_TE).scatter_(0, order_TE, places_TE)
    else:
        raise ValueError(f"policy={policy!r} must be 'probs' or 'position'")
    return plan.keep(map_TE & (place_TE < capacity))
