"""Sigmoid routing: an independent sigmoid score for each expert, compared with a cut-off."""

from __future__ import annotations

import torch
from torch import Tensor

from dynmoe.routing.groups import within_best_groups
from dynmoe.routing.plan import RoutingPlan
from dynmoe.routing.selection import check_limits, threshold_plan


def sigmoid_cutoff(
    logits_TE: Tensor, cutoff: float | Tensor = 0.5, *, renormalize: bool = False, min_experts: int = 1,
    max_experts: int | None = None, n_group: int = 1, topk_group: int = 1,
) -> RoutingPlan:  # fmt: skip
    """Selects every expert whose sigmoid score exceeds the cut-off; the gates are the scores.

    Args:
        logits_TE: router logits, any float dtype; the sigmoid is in fp32.
        cutoff: in [0, 1): one number, or a tensor [E] with one for each expert (its range is not checked).
        renormalize: make the gates of a token sum to 1.
        min_experts: floor of experts per token; with 0 a token may select no expert (its output is then 0).
        max_experts: ceiling of experts per token; the experts with the largest margin over their cut-off win.
        n_group, topk_group: select within the groups of best margins (:func:`within_best_groups`).

    Raises:
        ValueError: a number is out of range.
    """
    if not isinstance(cutoff, Tensor) and not 0.0 <= cutoff < 1.0:
        raise ValueError(f"cutoff={cutoff} must be in [0, 1)")
    check_limits(logits_TE.shape[1] * topk_group // n_group, min_experts, max_experts)
    logits_TE = logits_TE.float()
    scores_TE = torch.sigmoid(logits_TE)
    margin_TE = within_best_groups(scores_TE.detach() - cutoff, n_group, topk_group)
    return threshold_plan(scores_TE, logits_TE, margin_TE, renormalize, min_experts, max_experts)
