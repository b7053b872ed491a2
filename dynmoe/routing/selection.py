"""What the routers share: ranks of scores, limits of K, and the plans of routers with the same kind of gates."""

from __future__ import annotations

import torch
from torch import Tensor

from dynmoe.routing.plan import RoutingPlan


def sort_descending(scores_TE: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of each token from the best to the worst, and their experts, int64; ties go to the lower expert index.

    ``Tensor.sort(stable=True)`` without gradient. On a CPU NumPy's vectorised sort is 5 to 40 times as fast: an fp32
    score and its expert make one integer of the same order. A compiler cannot see what NumPy does.
    """
    scores_TE = scores_TE.detach()
    if scores_TE.device.type != "cpu" or scores_TE.dtype != torch.float32 or torch.compiler.is_compiling():
        return scores_TE.sort(dim=1, descending=True, stable=True)
    # Integers in the order of the numbers: negative ones have their other bits flipped. -0 becomes 0, to tie with it.
    bits_TE = (scores_TE + 0.0).view(torch.int32)
    ordered_TE = bits_TE ^ ((bits_TE >> 31) & 0x7FFFFFFF)
    # Negated for an ascending sort; the experts of equal scores then follow one another upwards.
    keys_TE = (-ordered_TE.long() << 32) + torch.arange(scores_TE.shape[1])
    keys_TE.numpy().sort(axis=1)
    order_TE = keys_TE & 0xFFFFFFFF
    return scores_TE.gather(1, order_TE), order_TE


def rank_descending(scores_TE: Tensor) -> Tensor:
    """Rank of each expert within its token, int64 [T, E]; 0 is the best, ties go to the lower expert index."""
    _, order_TE = sort_descending(scores_TE)
    ranks_TE = torch.arange(scores_TE.shape[1], device=scores_TE.device).expand_as(order_TE)
    return torch.empty_like(order_TE).scatter_(1, order_TE, ranks_TE)


def check_limits(num_experts: int, min_experts: int, max_experts: int | None) -> None:
    """Raises a ValueError unless 0 <= min <= max, 1 <= max, and the floor is not above the number of experts."""
    if max_experts is not None and max_experts < max(min_experts, 1):
        raise ValueError(f"min_experts={min_experts} and max_experts={max_experts} must satisfy 0 <= min <= max")
    if not 0 <= min_experts <= num_experts:
        raise ValueError(f"min_experts={min_experts} must lie between 0 and the number of experts ({num_experts})")


def limit_experts(map_TE: Tensor, rank_TE: Tensor, min_experts: int, max_experts: int | None) -> Tensor:
    """Adds the best-ranked experts up to ``min_experts`` and keeps the best-ranked ``max_experts`` of a token."""
    if min_experts > 0:
        map_TE = map_TE | (rank_TE < min_experts)
    if max_experts is not None:
        map_TE = map_TE & (rank_TE < max_experts)
    return map_TE


def sum_to_one(gates_TE: Tensor, summed_TE: Tensor | None = None) -> Tensor:
    """Gates of each token divided by their sum, or by that of ``summed_TE``.

    A token whose sum is 0 keeps its gates as they are, with a finite gradient.
    """
    sums_T1 = (gates_TE if summed_TE is None else summed_TE).sum(dim=1, keepdim=True)
    return gates_TE / torch.where(sums_T1 > 0, sums_T1, torch.ones_like(sums_T1))


def softmax_plan(logits_TE: Tensor, probs_TE: Tensor, map_TE: Tensor, renormalize: bool) -> RoutingPlan:
    """A plan whose gates are the probabilities of the chosen experts, raw or made to sum to 1."""
    gates_TE = probs_TE.masked_fill(~map_TE, 0.0)
    return RoutingPlan(sum_to_one(gates_TE) if renormalize else gates_TE, map_TE, map_TE, probs_TE, logits_TE)


def threshold_plan(
    scores_TE: Tensor,
    logits_TE: Tensor,
    threshold: float | Tensor,
    renormalize: bool,
    min_experts: int,
    max_experts: int | None,
) -> RoutingPlan:
    """A plan whose gates are the scores of the experts that exceed a threshold, within floor and ceiling.

    The best experts of a token are those that exceed theirs by most: a threshold that was raised because its expert
    has too many tokens must count for the tokens of the floor too.
    """
    margin_TE = scores_TE.detach() - threshold
    passed_TE = margin_TE > 0
    map_TE = limit_experts(passed_TE, rank_descending(margin_TE), min_experts, max_experts)
    gates_TE = scores_TE.masked_fill(~map_TE, 0.0)
    return RoutingPlan(
        sum_to_one(gates_TE) if renormalize else gates_TE, map_TE, map_TE, scores_TE, logits_TE,
        unclaimed_T=~passed_TE.any(dim=1),
    )  # fmt: skip
