"""Top-any gating: DynMoE (arXiv 2405.14297). Every expert has a prototype and a threshold of its own."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dynmoe.routing.plan import RoutingPlan
from dynmoe.routing.selection import check_limits, limit_experts, rank_descending, sum_to_one


class _StraightThroughStep(torch.autograd.Function):
    """1 where the margin is positive, else 0; the gradient passes unchanged (eq. 5)."""

    @staticmethod
    def forward(ctx: Any, margin: Tensor) -> Tensor:
        return (margin > 0).to(margin.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad


def cosines(hidden_TD: Tensor, prototypes_DE: Tensor) -> Tensor:
    """Cosine of each token with each prototype, fp32 [T, E]."""
    return F.normalize(hidden_TD.float(), dim=1) @ F.normalize(prototypes_DE.float(), dim=0)


def top_any(
    hidden_TD: Tensor,
    prototypes_DE: Tensor,
    thresholds_E: Tensor,
    active_E: Tensor,
    *,
    variant: str = "paper",
    training: bool = True,
    scale: float | Tensor = 1.0,
    straight_through: str | None = None,
    weights: str = "uniform",
    renormalize: bool = False,
    min_experts: int = 1,
    max_experts: int | None = None,
) -> RoutingPlan:
    """Selects every active expert whose score exceeds its threshold (eq. 3 to 6).

    The score is sigmoid(scale * cos(x, w_e)), the threshold sigmoid(scale * G_e), both in fp32.

    Args:
        hidden_TD: router inputs, any float dtype.
        prototypes_DE: one column for each expert slot.
        thresholds_E: G, before the sigmoid.
        active_E: bool; False masks an expert slot off.
        variant: ``paper`` or ``released``. The released code ignores ``min_experts``, lets a token select nobody in
            training, and gives it the single best score in evaluation.
        training: matters in the released variant only.
        scale: the papers' temperature, 1 in the released code; a tensor of one element may carry a gradient.
        straight_through: ``all`` lets the gradient of the step through for every expert (the paper's variant),
            ``selected`` only where the expert is selected (the released variant: its ReLU ends the others' gradient).
            None: by the variant.
        weights: ``uniform`` gates 1/K with K a constant (both variants), or ``score``: s_e times the step.
        renormalize: with ``score``, make the gates of a token sum to 1; uniform ones always do.
        min_experts: floor of experts per token; 0 lets a token select nobody (its output is then 0).
        max_experts: ceiling of experts per token. The best experts of a token, for floor and ceiling, are those that
            exceed their threshold by most; in the released variant those of the highest score.

    Raises:
        ValueError: a number, variant or choice outside its range, or no active expert (looked for on a CPU only, and
            not in a compiled graph: a GPU would be waited for).
    """
    if variant not in ("paper", "released"):
        raise ValueError(f"variant={variant!r} must be 'paper' or 'released'")
    if weights not in ("uniform", "score"):
        raise ValueError(f"weights={weights!r} must be 'uniform' or 'score'")
    if straight_through not in (None, "all", "selected"):
        raise ValueError(f"straight_through={straight_through!r} must be 'all' or 'selected'")
    check_limits(prototypes_DE.shape[1], min_experts, max_experts)
    active_E = active_E.to(torch.bool)
    if active_E.device.type == "cpu" and not torch.compiler.is_compiling() and not active_E.any():
        raise ValueError(f"active_E masks all {len(active_E)} experts off: leave at least one on")
    scores_TE = torch.sigmoid(scale * cosines(hidden_TD, prototypes_DE)) * active_E
    margin_TE = scores_TE - torch.sigmoid(scale * thresholds_E.float())
    ranked_TE = (scores_TE if variant == "released" else margin_TE).detach()
    if (straight_through or ("all" if variant == "paper" else "selected")) == "selected":
        margin_TE = torch.relu(margin_TE)
    step_TE = _StraightThroughStep.apply(margin_TE)

    map_TE = (step_TE.detach() > 0) & active_E
    unclaimed_T = ~map_TE.any(dim=1)
    rank_TE = rank_descending(ranked_TE.masked_fill(~active_E, -torch.inf))
    if variant == "released":
        min_experts = 0
        if not training:
            map_TE = map_TE | ((rank_TE < 1) & unclaimed_T.unsqueeze(1))
    map_TE = limit_experts(map_TE, rank_TE, min_experts, max_experts) & active_E

    # The choice as a number: 1 on the map and 0 elsewhere, with the gradient of the step wherever that passes.
    choice_TE = map_TE.float() + step_TE - step_TE.detach()
    if weights == "score":
        # In the sum the choice is a constant, as K is below: its gradient would lower the threshold of every expert
        # that is not selected, whatever that expert has to say.
        chosen_TE = scores_TE.masked_fill(~map_TE, 0.0)
        gates_TE = choice_TE * (sum_to_one(scores_TE, chosen_TE) if renormalize else scores_TE)
    else:
        gates_TE = choice_TE / map_TE.sum(dim=1, keepdim=True).clamp(min=1)
    return RoutingPlan(gates_TE, map_TE, map_TE, scores_TE, unclaimed_T=unclaimed_T, choice_TE=choice_TE)
