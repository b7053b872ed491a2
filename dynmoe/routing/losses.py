"""Auxiliary losses of the router: pure functions that return a scalar without its coefficient.

The caller passes :class:`RoutingCounts` summed over ranks, which make the gradient independent of the layout. With
``counts=None`` the plan holds all tokens. A loss of the load is a sum over the tokens of this rank, weighted by a
function of the counts (:func:`weigh`), so the balance losses and L1 also accept :class:`AsyncCounts`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dynmoe.routing.plan import AsyncCounts, RoutingCounts, RoutingPlan, weigh
from dynmoe.routing.selection import sum_to_one


def load_balance(
    plan: RoutingPlan, counts: RoutingCounts | AsyncCounts | None = None, *, per_route: bool = False
) -> Tensor:
    """E * sum_e f_e Q_e (arXiv 2403.07652, eq. 6): f_e is the fraction of tokens that select e, Q_e its mean score.

    At perfect balance of probabilities it is the mean number of experts per token, K. ``per_route`` divides by this K
    (a constant), which gives the switch loss of a top-k router.
    """
    num_experts = plan.scores_TE.shape[1]

    def weights_E(counts: RoutingCounts) -> Tensor:
        fraction_E = counts.selected_E / (counts.selected_E.sum().clamp(min=1) if per_route else counts.num_tokens)
        return num_experts * fraction_E / counts.tokens_per_rank

    return weigh(plan.scores_TE.sum(dim=0), RoutingCounts.of(plan) if counts is None else counts, weights_E)


def sequence_counts(plan: RoutingPlan, num_sequences: int) -> Tensor:
    """Number of tokens of each sequence that select each expert, fp32 [B, E]; tokens of a sequence are contiguous.

    Raises:
        ValueError: the number of tokens is not a multiple of ``num_sequences``.
    """
    num_tokens, num_experts = plan.selected_map_TE.shape
    if num_sequences < 1 or num_tokens % num_sequences:
        raise ValueError(f"num_sequences={num_sequences} must divide the number of tokens ({num_tokens})")
    return plan.selected_map_TE.view(num_sequences, -1, num_experts).float().sum(dim=1)


def sequence_balance(
    plan: RoutingPlan, selected_BE: Tensor | AsyncCounts, num_parts: int = 1, *, per_route: bool = False
) -> Tensor:
    """Mean over sequences of the :func:`load_balance` of each.

    Args:
        plan: of this rank's part of each sequence.
        selected_BE: :func:`sequence_counts`, summed over the ranks that share the sequences.
        num_parts: number of these ranks. The loss is the mean over them.
        per_route: divide by the experts per token of each sequence.
    """
    num_sequences, num_experts = selected_BE.shape
    mean_score_BE = plan.scores_TE.view(num_sequences, -1, num_experts).mean(dim=1)
    length = num_parts * (plan.scores_TE.shape[0] // num_sequences)

    def weights_BE(selected_BE: Tensor) -> Tensor:
        total_B1 = selected_BE.sum(dim=1, keepdim=True).clamp(min=1) if per_route else length
        return num_experts / num_sequences * (selected_BE / total_B1)

    return weigh(mean_score_BE, selected_BE, weights_BE)


def gate_balance(
    plan: RoutingPlan, counts: RoutingCounts | AsyncCounts | None = None, *, active_E: Tensor | None = None,
    per_route: bool = False,
) -> Tensor:  # fmt: skip
    """E^2 * mean_e(me_e * ce_e), the balance term of DynMoE's released code (January 2025).

    Over the tokens that selected an expert, me is the mean of their gates normalized to sum to 1, and ce the fraction
    that selects each expert. If E is the number of active experts, it is K at perfect balance, like
    :func:`load_balance`. ``active_E=None`` counts every slot, as the released code does. ``per_route`` divides by K.
    """
    num_experts = plan.gates_TE.shape[1] if active_E is None else active_E.sum()

    def weights_E(counts: RoutingCounts) -> Tensor:
        total = counts.selected_E.sum() if per_route else counts.num_routed_tokens
        return num_experts * (counts.selected_E / total.clamp(min=1)) / counts.routed_tokens_per_rank

    gate_sums_E = sum_to_one(plan.gates_TE).sum(dim=0)
    return weigh(gate_sums_E, RoutingCounts.of(plan) if counts is None else counts, weights_E)


def choice_balance(plan: RoutingPlan, active_E: Tensor, counts: RoutingCounts | AsyncCounts | None = None) -> Tensor:
    """Squared coefficient of variation of the load of active experts, differentiated through the choice.

    This is the load loss of arXiv 1701.06538 (eq. 11) with DynMoE's straight-through choice instead of a noisy
    estimate. The gradient of an expert's choice is its excess load, so the threshold of an unused expert falls.

    Raises:
        ValueError: the router of the plan passes no gradient through its choice.
    """
    if plan.choice_TE is None:
        raise ValueError("plan.choice_TE=None: choice_balance needs a straight-through choice; use top_any")
    active = active_E.float()
    num_active = active.sum()

    def weights_E(counts: RoutingCounts) -> Tensor:
        total = counts.selected_E.sum().clamp(min=1)
        excess_E = (counts.selected_E * num_active / total - 1.0) * active
        return excess_E / counts.tokens_per_rank * counts.num_tokens / total

    return weigh(plan.choice_TE.sum(dim=0), RoutingCounts.of(plan) if counts is None else counts, weights_E)


def l1(plan: RoutingPlan, target: float, counts: RoutingCounts | AsyncCounts | None = None) -> Tensor:
    """Sum over experts of f_e * (mean score), f_e = E / target * (fraction that selects e): ReMoE's penalty (eq. 13).

    The constant f_e balances the load. It is 1 for an expert with its share of ``target`` experts per token.
    """
    scale = plan.scores_TE.shape[1] / target

    def weights_E(counts: RoutingCounts) -> Tensor:
        return scale * counts.selected_E / counts.num_tokens / counts.tokens_per_rank

    return weigh(plan.scores_TE.sum(dim=0), RoutingCounts.of(plan) if counts is None else counts, weights_E)


def entropy(plan: RoutingPlan, counts: RoutingCounts | None = None) -> Tensor:
    """Mean over tokens of the entropy of the scores, in nats (arXiv 2403.07652, eq. 5); it lowers K."""
    scores_TE = plan.scores_TE
    tokens = scores_TE.shape[0] if counts is None else counts.tokens_per_rank
    # xlogy and its gradient are 0 at probability 0.
    return -torch.special.xlogy(scores_TE, scores_TE.clamp(min=torch.finfo(torch.float32).tiny)).sum() / tokens


def z_loss(plan: RoutingPlan, counts: RoutingCounts | None = None) -> Tensor:
    """Mean over tokens of logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906, eq. 5).

    Raises:
        ValueError: the router of the plan has no logits.
    """
    if plan.logits_TE is None:
        raise ValueError("plan.logits_TE=None: z_loss needs logits; use a router with logits (top_k or top_p)")
    tokens = plan.logits_TE.shape[0] if counts is None else counts.tokens_per_rank
    return plan.logits_TE.logsumexp(dim=1).square().sum() / tokens


def diversity(prototypes_DE: Tensor, active_E: Tensor) -> Tensor:
    """Frobenius norm of (W^T W - I) over pairs of active experts, W with unit columns (arXiv 2405.14297, eq. 8)."""
    unit_DE = F.normalize(prototypes_DE.float(), dim=0)
    mask_E = active_E.to(unit_DE.dtype)
    gram_EE = unit_DE.T @ unit_DE - torch.eye(unit_DE.shape[1], device=unit_DE.device)
    return torch.linalg.matrix_norm(gram_EE * torch.outer(mask_E, mask_E))


def simplicity(prototypes_DE: Tensor, active_E: Tensor | None = None) -> Tensor:
    """Mean norm of the prototypes of active experts (arXiv 2405.14297, eq. 8).

    ``active_E=None`` counts every slot, as the released code does.
    """
    norm_E = prototypes_DE.float().norm(dim=0)
    if active_E is None:
        return norm_E.mean()
    return torch.where(active_E.to(torch.bool), norm_E, 0.0).sum() / active_E.sum()


def efficiency(plan: RoutingPlan, counts: RoutingCounts | None = None, *, active_E: Tensor | None = None) -> Tensor:
    """Mean over tokens and active experts of the 0/1 choice, with its straight-through gradient.

    ``active_E=None`` counts every slot, as DynMoE's released code does.

    Raises:
        ValueError: the router of the plan passes no gradient through its choice.
    """
    if plan.choice_TE is None:
        raise ValueError("plan.choice_TE=None: efficiency needs a straight-through choice; use top_any")
    tokens = plan.choice_TE.shape[0] if counts is None else counts.tokens_per_rank
    return plan.choice_TE.sum() / (tokens * (plan.choice_TE.shape[1] if active_E is None else active_E.sum()))
