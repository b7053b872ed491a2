"""Null experts: AdaMoE (arXiv 2406.13233). Top-k over real experts and null experts, which compute nothing."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from dynmoe.routing.identity_experts import identity_experts
from dynmoe.routing.plan import AsyncCounts, RoutingCounts, RoutingPlan, weigh
from dynmoe.routing.selection import sum_to_one


def null_experts(
    logits_TX: Tensor, k: int, num_null: int, *, renormalize: bool = True, n_group: int = 1, topk_group: int = 1
) -> RoutingPlan:
    """Selects the ``k`` most probable of real and null experts; the plan has the real ones.

    Args:
        logits_TX: logits of E real experts, followed by those of ``num_null`` null experts; the softmax is in fp32.
        k: experts per token including null experts, 1 to X. Ties go to the lower index.
        num_null: number of null experts, at least 1.
        renormalize: make the gates of the real experts of a token sum to 1, as the paper does.
        n_group, topk_group: see :func:`identity_experts`.

    Raises:
        ValueError: a number is out of range.
    """
    num_all = logits_TX.shape[1]
    if not 1 <= num_null < num_all:
        raise ValueError(f"num_null={num_null} must be at least 1 and less than the number of logits ({num_all})")
    plan, _ = identity_experts(logits_TX, k, num_all - num_null, n_group=n_group, topk_group=topk_group)
    return dataclasses.replace(plan, gates_TE=sum_to_one(plan.gates_TE)) if renormalize else plan


def null_balance(plan: RoutingPlan, k: int, num_null: int, counts: RoutingCounts | AsyncCounts | None = None) -> Tensor:
    """The switch loss over real and null experts, with the mean load for each null expert (section 3.3).

    It is 1 at perfect balance. Load and probability of the null experts follow from those of the real ones: a token
    selects k experts, and probabilities sum to 1.
    """
    num_tokens, num_experts = plan.scores_TE.shape

    def weights_X(counts: RoutingCounts) -> Tensor:
        share_E = counts.selected_E / (k * counts.num_tokens)
        null_share = (1.0 - share_E.sum()) / num_null
        return (num_experts + num_null) * torch.cat([share_E, null_share.view(1)]) / counts.tokens_per_rank

    score_sums_E = plan.scores_TE.sum(dim=0)
    # The last entry is the total probability of the null experts: 1 minus that of the real ones, summed over tokens.
    score_sums_X = torch.cat([score_sums_E, (num_tokens - score_sums_E.sum()).view(1)])
    return weigh(score_sums_X, RoutingCounts.of(plan) if counts is None else counts, weights_X)
