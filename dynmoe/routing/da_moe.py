"""DA-MoE (arXiv 2409.06669): more experts for tokens that matter in attention."""

from __future__ import annotations

from torch import Tensor

from dynmoe.routing.selection import rank_descending


def experts_by_importance(
    probs_TE: Tensor, importance_T: Tensor, slope: Tensor, min_experts: int = 1, max_experts: int | None = None
) -> Tensor:
    """Mask of the round(slope * importance) most probable experts of each token, within the limits, bool [T, E]."""
    most = probs_TE.shape[1] if max_experts is None else max_experts
    experts_T = (slope * importance_T).round().clamp(min_experts, most)
    return rank_descending(probs_TE) < experts_T.unsqueeze(1)
