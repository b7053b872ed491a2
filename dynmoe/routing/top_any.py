"""Top-any gating: DynMoE (arXiv 2405.14297). Every expert has a prototype and a threshold of its own."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dynmoe.routing.plan import RoutingPlan
from dynmoe.routing.selection import limit_experts, rank_descending


class _StraightThroughStep(torch.autograd.Function):
    """1 where the margin is positive, else 0; the gradient passes unchanged (eq. 5)."""

    @staticmethod
    def forward(ctx: Any, margin: Tensor) -> Tensor:
        return (margin > 0).to(margin.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad


def top_any(
    hidden_TD: Tensor,
    prototypes_DE: Tensor,
    thresholds_E: Tensor,
    active_E: Tensor,
    *,
    form: str = "paper",
    training: bool = True,
    scale: float = 1.0,
    min_experts: int = 1,
    max_experts: int | None = None,
) -> RoutingPlan:
    """Selects every active expert whose score exceeds its threshold, with uniform gates 1/K (eq. 3 to 6).

    The score is sigmoid(scale * cos(x, w_e)), the threshold sigmoid(scale * G_e), both in fp32.

    Args:
        hidden_TD: router inputs, any float dtype.
        prototypes_DE: one column for each expert slot.
        thresholds_E: G, before the sigmoid.
        active_E: bool; False masks an expert slot off.
        form: ``paper`` lets the gradient through the step for every expert; ``released`` only where s > g (it
            applies a ReLU first), ignores ``min_experts``, lets a token select nobody in training, and gives it the
            single best score in evaluation.
        training: matters in the released form only.
        scale: the papers' temperature, 1 in the released code.
        min_experts: floor of experts per token; 0 lets a token select nobody (its output is then 0).
        max_experts: ceiling of experts per token, by score.

    Raises:
        ValueError: a number or form outside its range.
    """
    if form not in ("paper", "released"):
        raise ValueError(f"form={form!r} must be 'paper' or 'released'")
    if min_experts < 0 or (max_experts is not None and max_experts < max(min_experts, 1)):
        raise ValueError(f"min_experts={min_experts} and max_experts={max_experts} must satisfy 0 <= min <= max")
    active_E = active_E.to(torch.bool)
    cosine_TE = F.normalize(hidden_TD.float(), dim=1) @ F.normalize(prototypes_DE.float(), dim=0)
    scores_TE = torch.sigmoid(scale * cosine_TE) * active_E
    margin_TE = scores_TE - torch.sigmoid(scale * thresholds_E.float())
    if form == "released":
        margin_TE, min_experts = torch.relu(margin_TE), 0
    step_TE = _StraightThroughStep.apply(margin_TE)

    detached_TE = scores_TE.detach()
    map_TE = (step_TE.detach() > 0) & active_E
    rank_TE = rank_descending(detached_TE)
    if form == "released" and not training:
        map_TE = map_TE | ((rank_TE < 1) & ~map_TE.any(dim=1, keepdim=True))
    map_TE = limit_experts(map_TE, rank_TE, min_experts, max_experts) & active_E

    # The step already is 1 on the map, except where a floor added an expert: it gets the same gradient.
    chosen_TE = torch.where(map_TE & (step_TE.detach() == 0), step_TE + 1.0, step_TE)
    num_chosen_T1 = map_TE.sum(dim=1, keepdim=True).clamp(min=1)
    gates_TE = chosen_TE / num_chosen_T1
    if form == "paper":
        # Experts that were not chosen have gate 0 and still pass the gradient to their margin.
        gates_TE = torch.where(map_TE, gates_TE, gates_TE - gates_TE.detach())
    else:
        gates_TE = gates_TE.masked_fill(~map_TE, 0.0)
    return RoutingPlan(gates_TE, map_TE, map_TE, scores_TE)
