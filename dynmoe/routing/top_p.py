"""Top-p routing: "Harder Tasks Need More Experts" (arXiv 2403.07652)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dynmoe.routing.groups import within_best_groups
from dynmoe.routing.plan import RoutingPlan
from dynmoe.routing.selection import check_limits, softmax_plan, sort_descending


def top_p(
    logits_TE: Tensor, p: float | Tensor, *, variant: str = "paper", renormalize: bool = False, min_experts: int = 1,
    max_experts: int | None = None, n_group: int = 1, topk_group: int = 1,
) -> RoutingPlan:  # fmt: skip
    """Selects the fewest experts, best first, whose probabilities sum to ``p`` (section 3.2, eq. 4).

    Args:
        logits_TE: router logits, any float dtype; the softmax is in fp32.
        p: probability mass to reach, in (0, 1]; 1 selects every expert. A tensor of one element is not checked, because
            that would wait for the device.
        variant: ``paper`` stops at a sum of at least p, ``released`` at a sum above p.
        renormalize: make the gates of a token sum to 1; both variants use raw probabilities by default.
        min_experts: floor of experts per token, at least 1.
        max_experts: ceiling of experts per token.
        n_group, topk_group: select within the best groups (:func:`within_best_groups`): all their experts, if their
            probabilities do not reach p.

    Raises:
        ValueError: a number is out of range, or the variant is unknown.
    """
    if not isinstance(p, Tensor) and not 0.0 < p <= 1.0:
        raise ValueError(f"p={p} must be in (0, 1]")
    if variant not in ("paper", "released"):
        raise ValueError(f"variant={variant!r} must be 'paper' or 'released'")
    if min_experts < 1:
        raise ValueError(f"min_experts={min_experts} must be at least 1: top_p always selects an expert")
    check_limits(logits_TE.shape[1] * topk_group // n_group, min_experts, max_experts)
    logits_TE = logits_TE.float()
    probs_TE = torch.softmax(logits_TE, dim=1)
    sorted_TE, order_TE = sort_descending(within_best_groups(probs_TE.detach(), n_group, topk_group))
    # An expert is selected if the better ones do not reach p. p = 1 also selects experts with a probability of 0.
    better_TE = sorted_TE[:, :-1].clamp(min=0.0).cumsum(dim=1)
    p = torch.as_tensor(p, dtype=torch.float32, device=logits_TE.device)
    selected_TE = torch.ones_like(sorted_TE, dtype=torch.bool)  # in descending order; the best one always
    selected_TE[:, 1:] = (better_TE < p if variant == "paper" else better_TE <= p) | (p >= 1.0)
    if min_experts > 1:
        selected_TE[:, :min_experts] = True
    if max_experts is not None:
        selected_TE[:, max_experts:] = False
    selected_TE &= ~sorted_TE.isneginf()
    map_TE = torch.zeros_like(selected_TE).scatter_(1, order_TE, selected_TE)
    return softmax_plan(logits_TE, probs_TE, map_TE, renormalize)


def normalized_logits(logits_TE: Tensor, scale: Tensor) -> Tensor:
    """The logits of each token with mean 0 over the experts and standard deviation ``scale``, fp32 (arXiv 2512.13996).

    The deviation is that of a population. As in a layer norm, 1e-5 is added to the variance, which keeps gradients
    finite if all logits are equal.
    """
    return F.layer_norm(logits_TE.float(), logits_TE.shape[1:]) * scale.float()
