"""Top-any gating: DynMoE (arXiv 2405.14297). Every expert has its own prototype and threshold."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dynmoe.routing.groups import within_best_groups
from dynmoe.routing.plan import RoutingPlan
from dynmoe.routing.selection import check_limits, limit_experts, rank_descending, sum_to_one


class _StraightThroughStep(torch.autograd.Function):
    """1 where the threshold is exceeded, else 0; passes the gradient to the margin unchanged (eq. 5)."""

    @staticmethod
    def forward(ctx: Any, margin: Tensor, exceeds: Tensor) -> Tensor:
        return exceeds.to(margin.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None


def cosines(hidden_TD: Tensor, prototypes_DE: Tensor) -> Tensor:
    """Cosine of each token with each prototype, fp32 [T, E]."""
    return F.normalize(hidden_TD.float(), dim=1) @ F.normalize(prototypes_DE.float(), dim=0)


def _check_choices(variant: str, weights: str, straight_through: str | None) -> None:
    if variant not in ("paper", "released"):
        raise ValueError(f"variant={variant!r} must be 'paper' or 'released'")
    if weights not in ("uniform", "score"):
        raise ValueError(f"weights={weights!r} must be 'uniform' or 'score'")
    if straight_through not in (None, "all", "selected"):
        raise ValueError(f"straight_through={straight_through!r} must be 'all' or 'selected'")


def top_any(
    hidden_TD: Tensor, prototypes_DE: Tensor, thresholds_E: Tensor, active_E: Tensor, *, variant: str = "paper",
    training: bool = True, scale: float | Tensor = 1.0, straight_through: str | None = None, weights: str = "uniform",
    renormalize: bool = False, min_experts: int = 1, max_experts: int | None = None, n_group: int = 1,
    topk_group: int = 1,
) -> RoutingPlan:  # fmt: skip
    """Selects every active expert whose score exceeds its threshold (eq. 3 to 6).

    The score is sigmoid(scale * cos(x, w_e)), the threshold sigmoid(scale * G_e), both in fp32. Except in the released
    variant, cos(x, w_e) is compared with G_e, which is the same but for rounding: at a scale of sqrt(1024), the scores
    of all cosines above 0.54 are 1.

    Args:
        hidden_TD: router inputs, any float dtype.
        prototypes_DE: one column for each expert slot.
        thresholds_E: G, before the sigmoid.
        active_E: bool; False disables an expert slot.
        variant: ``paper`` or ``released``. The released code ignores ``min_experts``: a token that exceeds no threshold
            has no expert in training, and the one with the highest score in evaluation.
        training: used by the released variant only.
        scale: the temperature of the papers, 1 in the released code; a tensor of one element may have a gradient.
        straight_through: ``all`` passes the gradient of the step to every expert (paper), ``selected`` only to the
            selected ones (released: its ReLU stops the gradient of the others). None: by the variant.
        weights: ``uniform``: gates are 1/K with K a constant (both variants); ``score``: s_e times the step.
        renormalize: with ``score``, make the gates of a token sum to 1; uniform gates always do.
        min_experts: floor of experts per token; with 0 a token may select no expert (its output is then 0).
        max_experts: ceiling of experts per token. For floor and ceiling, the best experts of a token have the
            largest cos(x, w_e) - G_e; in the released variant they have the highest scores.
        n_group, topk_group: select within the groups of the best experts in this order (:func:`within_best_groups`).

    Raises:
        ValueError: an argument is out of range, or no expert is active (checked on a CPU outside compiled graphs only).
    """
    _check_choices(variant, weights, straight_through)
    check_limits(prototypes_DE.shape[1] * topk_group // n_group, min_experts, max_experts)
    active_E = active_E.to(torch.bool)
    if active_E.device.type == "cpu" and not torch.compiler.is_compiling() and not active_E.any():
        raise ValueError(f"active_E disables all {len(active_E)} experts; enable at least one")
    thresholds_E = thresholds_E.float()
    cosines_TE = cosines(hidden_TD, prototypes_DE)
    logits_TE = scale * cosines_TE
    scores_TE = torch.sigmoid(logits_TE) * active_E
    margin_TE = scores_TE - torch.sigmoid(scale * thresholds_E)
    with torch.no_grad():
        if variant == "released":
            exceeds_TE = margin_TE > 0
            ranked_TE = scores_TE.masked_fill(~active_E, -1.0)
        else:
            distance_TE = cosines_TE - thresholds_E
            exceeds_TE = (distance_TE > 0) & active_E
            # No distance is below this, so a group of inactive experts is the last choice.
            ranked_TE = torch.where(active_E, distance_TE, -1.0 - thresholds_E.max())
    if (straight_through or ("all" if variant == "paper" else "selected")) == "selected":
        margin_TE = margin_TE.masked_fill(~exceeds_TE, 0.0)
    step_TE = _StraightThroughStep.apply(margin_TE, exceeds_TE)

    ranked_TE = within_best_groups(ranked_TE, n_group, topk_group)
    usable_TE = active_E & ~ranked_TE.isneginf()
    map_TE = exceeds_TE & usable_TE
    unclaimed_T = ~map_TE.any(dim=1)
    rank_TE = rank_descending(ranked_TE.masked_fill(~usable_TE, -torch.inf))
    if variant == "released":
        min_experts = 0
        if not training:
            map_TE = map_TE | ((rank_TE < 1) & unclaimed_T.unsqueeze(1))
    map_TE = limit_experts(map_TE, rank_TE, min_experts, max_experts) & usable_TE

    return top_any_plan(map_TE, step_TE, scores_TE, logits_TE, unclaimed_T, weights, renormalize)


def top_any_plan(
    map_TE: Tensor, step_TE: Tensor, scores_TE: Tensor, logits_TE: Tensor | None, unclaimed_T: Tensor | None,
    weights: str, renormalize: bool,
) -> RoutingPlan:  # fmt: skip
    """The plan with these experts, of which ``step_TE`` (0 or 1) has the straight-through gradient.

    See :func:`top_any` for ``weights`` and ``renormalize``.
    """
    # The value is that of the map, the gradient that of the step.
    choice_TE = map_TE.float() + step_TE - step_TE.detach()
    if weights == "score":
        # The choice is a constant in the sum, like K below: its gradient would lower the threshold of every unselected
        # expert, regardless of the expert's output.
        selected_TE = scores_TE.masked_fill(~map_TE, 0.0)
        gates_TE = choice_TE * (sum_to_one(scores_TE, selected_TE) if renormalize else scores_TE)
    else:
        gates_TE = choice_TE / map_TE.sum(dim=1, keepdim=True).clamp(min=1)
    return RoutingPlan(gates_TE, map_TE, map_TE, scores_TE, logits_TE, unclaimed_T=unclaimed_T, choice_TE=choice_TE)
