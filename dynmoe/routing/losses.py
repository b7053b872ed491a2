"""Auxiliary losses of the router: pure functions, each a scalar without its coefficient.

Counts come in as :class:`RoutingCounts`, summed over ranks by the caller; see there why the gradient then does not
depend on the layout. ``counts=None`` takes the plan's own tokens for all there are.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dynmoe.routing.plan import RoutingCounts, RoutingPlan


def load_balance(plan: RoutingPlan, counts: RoutingCounts | None = None, *, per_route: bool = False) -> Tensor:
    """E * sum_e f_e Q_e (arXiv 2403.07652, eq. 6): f_e fraction of tokens that select e, Q_e its mean score.

    At perfect balance of probabilities it is the mean number of experts per token, K; ``per_route`` divides by that
    K (a constant), which gives the switch loss of a top-k router.
    """
    counts = RoutingCounts.of(plan) if counts is None else counts
    fraction_E = counts.selected_E / (counts.selected_E.sum().clamp(min=1) if per_route else counts.num_tokens)
    mean_score_E = plan.scores_TE.sum(dim=0) / counts.tokens_per_rank
    return plan.scores_TE.shape[1] * (fraction_E * mean_score_E).sum()


def gate_balance(plan: RoutingPlan, counts: RoutingCounts | None = None) -> Tensor:
    """E^2 * mean_e(me_e * ce_e), DynMoE's released balance term (January 2025).

    Over the tokens that selected somebody: me is the mean of their gates normalised to sum 1, ce the fraction that
    selects each expert.
    """
    counts = RoutingCounts.of(plan) if counts is None else counts
    sums_T1 = plan.gates_TE.sum(dim=1, keepdim=True)
    normalized_TE = plan.gates_TE / torch.where(sums_T1 > 0, sums_T1, torch.ones_like(sums_T1))
    mean_gate_E = normalized_TE.sum(dim=0) / counts.routed_tokens_per_rank
    fraction_E = counts.selected_E / counts.num_routed_tokens.clamp(min=1)
    return plan.gates_TE.shape[1] ** 2 * (mean_gate_E * fraction_E).mean()


def entropy(plan: RoutingPlan, counts: RoutingCounts | None = None) -> Tensor:
    """Mean over tokens of the entropy of the scores, in nats (arXiv 2403.07652, eq. 5): what makes K shrink."""
    tokens = plan.scores_TE.shape[0] if counts is None else counts.tokens_per_rank
    # xlogy is 0 at probability 0, gradient included.
    return (
        -torch.special.xlogy(plan.scores_TE, plan.scores_TE.clamp(min=torch.finfo(torch.float32).tiny)).sum() / tokens
    )


def z_loss(plan: RoutingPlan, counts: RoutingCounts | None = None) -> Tensor:
    """Mean over tokens of logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906, eq. 5).

    Raises:
        ValueError: the plan's router has no logits.
    """
    if plan.logits_TE is None:
        raise ValueError("z_loss needs a router with logits (top_k or top_p)")
    tokens = plan.logits_TE.shape[0] if counts is None else counts.tokens_per_rank
    return plan.logits_TE.logsumexp(dim=1).square().sum() / tokens


def diversity(prototypes_DE: Tensor, active_E: Tensor) -> Tensor:
    """Frobenius norm of (W^T W - I) over pairs of active experts, W with unit columns (arXiv 2405.14297, eq. 8)."""
    unit_DE = F.normalize(prototypes_DE.float(), dim=0)
    mask_E = active_E.to(unit_DE.dtype)
    gram_EE = unit_DE.T @ unit_DE - torch.eye(unit_DE.shape[1], device=unit_DE.device)
    return torch.linalg.matrix_norm(gram_EE * torch.outer(mask_E, mask_E))


def simplicity(prototypes_DE: Tensor) -> Tensor:
    """Mean norm of the prototypes, over every slot as in the released code (arXiv 2405.14297, eq. 8)."""
    return prototypes_DE.float().norm(dim=0).mean()


def efficiency(plan: RoutingPlan, counts: RoutingCounts | None = None) -> Tensor:
    """Mean over tokens and slots of the 0/1 choice, with its straight-through gradient (released DynMoE code)."""
    tokens = plan.gates_TE.shape[0] if counts is None else counts.tokens_per_rank
    choice_TE = plan.gates_TE * plan.experts_per_token_T.clamp(min=1).unsqueeze(1)
    return choice_TE.sum() / (tokens * plan.gates_TE.shape[1])


def released_top_any_loss(plan: RoutingPlan, prototypes_DE: Tensor, active_E: Tensor) -> Tensor:
    """The whole auxiliary loss of DynMoE's released code: diversity, simplicity, balance and efficiency, each × 1."""
    parameters = diversity(prototypes_DE, active_E) + simplicity(prototypes_DE)
    return parameters + gate_balance(plan) + efficiency(plan)
