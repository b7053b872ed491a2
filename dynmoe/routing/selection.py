"""Functions that routers share: ranks of scores, limits of K, and plans for each kind of gates."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from dynmoe.routing.plan import RoutingPlan

_FEW_SCORES = 2048  # up to here, packing takes longer than it saves


def sort_descending(scores_TE: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of each token in descending order, and their experts, int64; ties go to the lower expert index.

    Equals ``Tensor.sort(stable=True)`` without gradients. On a CPU, NumPy's vectorized sort of integers is 5 to 40
    times as fast if there are many tokens: a score (fp32) and its expert are packed into one integer. torch.compile
    cannot trace NumPy.
    """
    scores_TE = scores_TE.detach()
    few = scores_TE.numel() <= _FEW_SCORES or scores_TE.device.type != "cpu"
    if few or scores_TE.dtype != torch.float32 or torch.compiler.is_compiling():
        return scores_TE.sort(dim=1, descending=True, stable=True)
    # Integers in the order of the floats: of negative ones all other bits are flipped. -0 becomes 0, to tie with it.
    bits_TE = (scores_TE + 0.0).view(torch.int32)
    ordered_TE = bits_TE ^ ((bits_TE >> 31) & 0x7FFFFFFF)
    # Negated, because NumPy sorts in ascending order; equal scores are then ordered by expert.
    keys_TE = (-ordered_TE.long() << 32) + torch.arange(scores_TE.shape[1])
    keys_TE.numpy().sort(axis=1)
    order_TE = keys_TE & 0xFFFFFFFF
    return scores_TE.gather(1, order_TE), order_TE


def rank_descending(scores_TE: Tensor) -> Tensor:
    """Rank of each expert within its token, int64 [T, E]; 0 is the best, ties go to the lower expert index."""
    _, order_TE = sort_descending(scores_TE)
    if torch.compiler.is_compiling():
        return order_TE.argsort(dim=1)  # compiled by torch 2.13 for a CPU, the scatter below can be lost
    ranks_TE = torch.arange(scores_TE.shape[1], device=scores_TE.device).expand_as(order_TE)
    return torch.empty_like(order_TE).scatter_(1, order_TE, ranks_TE)


def check_limits(num_experts: int, min_experts: int, max_experts: int | None) -> None:
    """Raises a ValueError unless 0 <= min <= max, max >= 1 and min <= num_experts."""
    if max_experts is not None and max_experts < max(min_experts, 1):
        raise ValueError(f"max_experts={max_experts} must be at least 1 and min_experts ({min_experts})")
    if not 0 <= min_experts <= num_experts:
        raise ValueError(f"min_experts={min_experts} must be between 0 and the number of experts ({num_experts})")


def limit_experts(map_TE: Tensor, rank_TE: Tensor, min_experts: int, max_experts: int | None) -> Tensor:
    """Adds the best experts of a token up to ``min_experts``, and drops those beyond the best ``max_experts``."""
    if min_experts > 0:
        map_TE = map_TE | (rank_TE < min_experts)
    if max_experts is not None:
        map_TE = map_TE & (rank_TE < max_experts)
    return map_TE


def sum_to_one(gates_TE: Tensor, summed_TE: Tensor | None = None) -> Tensor:
    """Divides the gates of each token by their sum, or by the sum of ``summed_TE``.

    If the sum is 0, the gates are unchanged and the gradient is finite.
    """
    sums_T1 = (gates_TE if summed_TE is None else summed_TE).sum(dim=1, keepdim=True)
    return gates_TE / torch.where(sums_T1 > 0, sums_T1, torch.ones_like(sums_T1))


def softmax_plan(logits_TE: Tensor, probs_TE: Tensor, map_TE: Tensor, renormalize: bool) -> RoutingPlan:
    """A plan whose gates are the probabilities, or other scores, of the selected experts, optionally summing to 1."""
    gates_TE = probs_TE.masked_fill(~map_TE, 0.0)
    return RoutingPlan(sum_to_one(gates_TE) if renormalize else gates_TE, map_TE, map_TE, probs_TE, logits_TE)


def with_experts(plan: RoutingPlan, map_TE: Tensor, renormalize: bool) -> RoutingPlan:
    """``plan`` with other experts, whose gates are their scores, optionally renormalized to sum to 1.

    ``unclaimed_T`` is unchanged: it compares the scores with the router's own thresholds.
    """
    gates_TE = plan.scores_TE.masked_fill(~map_TE, 0.0)
    if renormalize:
        gates_TE = sum_to_one(gates_TE)
    return dataclasses.replace(plan, gates_TE=gates_TE, routing_map_TE=map_TE, selected_map_TE=map_TE)


def threshold_plan(
    scores_TE: Tensor, logits_TE: Tensor, margin_TE: Tensor, renormalize: bool, min_experts: int,
    max_experts: int | None,
) -> RoutingPlan:  # fmt: skip
    """A plan whose gates are the scores of the experts that exceed their threshold, within floor and ceiling.

    The best experts of a token exceed their threshold by the largest margin, ``margin_TE`` (without gradients). The
    threshold of an overloaded expert thus also repels tokens that the floor assigns.
    """
    passed_TE = margin_TE > 0
    map_TE = limit_experts(passed_TE, rank_descending(margin_TE), min_experts, max_experts)
    gates_TE = scores_TE.masked_fill(~map_TE, 0.0)
    return RoutingPlan(
        sum_to_one(gates_TE) if renormalize else gates_TE, map_TE, map_TE, scores_TE, logits_TE,
        unclaimed_T=~passed_TE.any(dim=1),
    )  # fmt: skip
