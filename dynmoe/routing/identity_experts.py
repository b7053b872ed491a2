"""Zero-computation experts: LongCat-Flash (arXiv 2509.01322) and MoE++ (arXiv 2410.07348).

Top-k over FFN experts and experts without computation, whose output the token's own rank knows: the token itself
(identity, MoE++'s copy), nothing (zero), or a mix of the token and a trained vector (constant).

Shape letters of this file: Z zero-computation experts, J constant experts, X all experts, G groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dynmoe.routing.groups import within_best_groups
from dynmoe.routing.plan import AsyncCounts, RoutingCounts, RoutingPlan, weigh
from dynmoe.routing.selection import rank_descending


def identity_experts(
    logits_TX: Tensor, k: int, num_experts: int, *, bias_X: Tensor | None = None, n_group: int = 1, topk_group: int = 1
) -> tuple[RoutingPlan, Tensor]:
    """Selects the ``k`` best of all experts by probability plus bias (LongCat-Flash, eq. 1).

    Args:
        logits_TX: logits of the FFN experts, followed by those of zero-computation experts; the softmax is in fp32.
        k: experts per token including zero-computation ones, 1 to the number that a token may use. Ties go to the
            lower index.
        num_experts: number of FFN experts.
        bias_X: added to the probabilities for the selection, not for the gates.
        n_group, topk_group: select FFN experts within the best groups (:func:`within_best_groups`); zero-computation
            experts, which are on every rank, are in no group.

    Returns:
        The plan of the FFN experts, whose gates are the probabilities, not renormalized; and the gates of the
        zero-computation experts, fp32 [T, Z].

    Raises:
        ValueError: a number is out of range.
    """
    num_all = logits_TX.shape[1]
    if not 1 <= num_experts < num_all:
        raise ValueError(f"num_experts={num_experts} must be between 1 and the number of logits ({num_all}) - 1")
    most = num_experts * topk_group // n_group + num_all - num_experts
    if not 1 <= k <= most:
        raise ValueError(f"k={k} must be between 1 and the number of experts that a token may use ({most})")
    logits_TX = logits_TX.float()
    probs_TX = torch.softmax(logits_TX, dim=1)
    ranked_TX = probs_TX.detach() if bias_X is None else probs_TX.detach() + bias_X
    ranked_TE, ranked_TZ = ranked_TX.split([num_experts, num_all - num_experts], dim=1)
    ranked_TE = within_best_groups(ranked_TE, n_group, topk_group)
    map_TX = rank_descending(torch.cat([ranked_TE, ranked_TZ], dim=1)) < k
    gates_TX = probs_TX.masked_fill(~map_TX, 0.0)
    gates_TE, gates_TZ = gates_TX.split([num_experts, num_all - num_experts], dim=1)
    map_TE = map_TX[:, :num_experts]
    unclaimed_T = ~map_TE.any(dim=1)
    plan = RoutingPlan(gates_TE, map_TE, map_TE, probs_TX[:, :num_experts], logits_TX, unclaimed_T=unclaimed_T)
    return plan, gates_TZ


def identity_output(x_TD: Tensor, gates_TZ: Tensor, num_identity: int) -> Tensor:
    """Sum of the outputs of the identity experts, which come first in ``gates_TZ``: their gates times the token."""
    return (gates_TZ[:, :num_identity].sum(dim=1, keepdim=True) * x_TD).to(x_TD.dtype)


def constant_output(x_TD: Tensor, gates_TZ: Tensor, mix_TJ2: Tensor, constants_JD: Tensor) -> Tensor:
    """Sum of the outputs of the constant experts, which come last in ``gates_TZ`` (MoE++, eq. 5).

    Args:
        x_TD: the tokens.
        gates_TZ: of :func:`identity_experts`.
        mix_TJ2: logits of the shares of the token and of the vector in each expert's output.
        constants_JD: the vector of each expert.
    """
    weights_TJ2 = gates_TZ[:, -len(constants_JD) :, None] * mix_TJ2.softmax(dim=2)
    of_token_TJ, of_constant_TJ = weights_TJ2.unbind(dim=2)
    y_TD = of_token_TJ.sum(dim=1, keepdim=True) * x_TD + of_constant_TJ @ constants_JD.float()
    return y_TD.to(x_TD.dtype)


def ffn_bias_change(selected_E: Tensor, num_tokens: Tensor, k: int, target: float, rate: float) -> Tensor:
    """Change of the biases of FFN experts that holds their mean number per token (LongCat-Flash, eq. 2).

    rate * (K_e / K / N - T_i / (K T)). The mean change is zero if a token selects ``target`` (K_e) of N FFN experts on
    average, and each change is zero if the load is balanced too.
    """
    return rate * (target / k / len(selected_E) - selected_E / (k * num_tokens))


def group_balance(
    plan: RoutingPlan, k: int, num_groups: int, target: float, counts: RoutingCounts | AsyncCounts | None = None
) -> Tensor:
    """Sum over groups of f_j * P_j (LongCat-Flash, eq. 3 to 5): balances devices instead of experts.

    The FFN experts form ``num_groups`` consecutive groups, all zero-computation experts one more. P_j is the mean
    probability of a group. f_j is its number of selections (the paper has an indicator; we count each selected expert),
    relative to an equal share of ``target`` (K_e) per token for FFN groups, and to K - K_e for the other one. So f_j is
    1 in each group at perfect balance. With K_e = K the other group has no weight.
    """
    num_tokens, num_experts = plan.scores_TE.shape
    spare = k - target

    def weights_G(counts: RoutingCounts) -> Tensor:
        routes_G = counts.selected_E.view(num_groups, -1).sum(dim=1)
        ffn_G = routes_G * num_groups / target
        free = (k * counts.num_tokens - routes_G.sum()) / spare if spare > 0 else torch.zeros_like(counts.num_tokens)
        return torch.cat([ffn_G, free.view(1)]) / counts.num_tokens / counts.tokens_per_rank

    score_sums_G = plan.scores_TE.sum(dim=0).view(num_groups, num_experts // num_groups).sum(dim=1)
    # The last entry is the total probability of the zero-computation experts: 1 minus the others, summed over tokens.
    score_sums_G = torch.cat([score_sums_G, (num_tokens - score_sums_G.sum()).view(1)])
    return weigh(score_sums_G, RoutingCounts.of(plan) if counts is None else counts, weights_G)
