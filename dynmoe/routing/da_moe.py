"""DA-MoE (arXiv 2409.06669): more experts for tokens that matter in attention."""

from __future__ import annotations

from torch import Tensor

from dynmoe.routing.groups import within_best_groups
from dynmoe.routing.selection import rank_descending


def experts_by_importance(
    probs_TE: Tensor, importance_T: Tensor, slope: Tensor, min_experts: int = 1, max_experts: int | None = None,
    n_group: int = 1, topk_group: int = 1,
) -> Tensor:  # fmt: skip
    """Mask of the round(slope * importance) most probable experts of each token, within the limits, bool [T, E]."""
    most = probs_TE.shape[1] * topk_group // n_group
    experts_T = (
        (slope * importance_T).round().clamp(min_experts, most if max_experts is None else min(max_experts, most))
    )
    return rank_descending(within_best_groups(probs_TE.detach(), n_group, topk_group)) < experts_T.unsqueeze(1)
