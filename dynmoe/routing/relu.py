"""ReLU routing: ReMoE (arXiv 2412.14711). It is fully differentiable; an adaptive L1 penalty holds the budget."""

from __future__ import annotations

import torch
from torch import Tensor

from dynmoe.routing.groups import within_best_groups
from dynmoe.routing.plan import RoutingPlan
from dynmoe.routing.selection import check_limits, threshold_plan


def relu(logits_TE: Tensor, *, max_experts: int | None = None, n_group: int = 1, topk_group: int = 1) -> RoutingPlan:
    """Selects every expert of positive logit; the gates are the logits (eq. 5).

    A token without a positive logit selects no expert: a floor would add experts with gate 0.

    Args:
        logits_TE: router logits, any float dtype.
        max_experts: ceiling of experts per token; the highest logits win.
        n_group, topk_group: select within the groups of highest logits (:func:`within_best_groups`).

    Raises:
        ValueError: ``max_experts`` below 1.
    """
    check_limits(logits_TE.shape[1], 0, max_experts)
    logits_TE = logits_TE.float()
    margin_TE = within_best_groups(logits_TE.detach(), n_group, topk_group)
    return threshold_plan(torch.relu(logits_TE), logits_TE, margin_TE, False, 0, max_experts)


def adapt_l1(coefficient: Tensor, experts_per_token: Tensor, target: float, factor: float = 1.2) -> Tensor:
    """Multiplies the coefficient of the L1 penalty by ``factor`` if K is above ``target``, and divides it if below.

    This is eq. 9 of the paper, whose sparsity is 1 - K / E. The range is [1e-10, 100], so the coefficient recovers
    quickly after a target that could not be reached.
    """
    return (coefficient * factor ** torch.sign(experts_per_token - target)).clamp(1e-10, 1e2)
