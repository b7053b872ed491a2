"""Quantile routing (https://kexue.fm/archives/11626): each expert takes its share of the tokens, those of best score.

Quantiles come from histograms, whose counts can be summed over ranks. A bin holds the same share of a normal
distribution wherever it lies: a logit's place among the bins is the sigmoid of its distance from the mean, in
deviations. A bad fit only makes some bins fuller than others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dynmoe.routing.histogram import kth_largest
from dynmoe.routing.plan import RoutingPlan
from dynmoe.routing.selection import sum_to_one

# With this factor, the sigmoid is within 0.01 of the cumulative distribution function of the normal distribution.
_STEEPNESS = 1.702
# Places this close to 0 or 1 are not told apart, so that quantiles stay finite.
_EDGE = 1e-6


def quantile_choice(logits_TE: Tensor, thresholds_E: Tensor, *, renormalize: bool = False) -> RoutingPlan:
    """Selects every expert whose logit exceeds its threshold; the gates are the sigmoids of the logits.

    A token above no threshold selects no expert: a floor or ceiling would change the load of the experts. Logits are
    compared, because sigmoids of large logits are equal.

    Args:
        logits_TE: router logits, any float dtype.
        thresholds_E: fp32.
        renormalize: make the gates of a token sum to 1.
    """
    logits_TE = logits_TE.float()
    map_TE = logits_TE.detach() > thresholds_E
    scores_TE = logits_TE.sigmoid()
    gates_TE = scores_TE.masked_fill(~map_TE, 0.0)
    return RoutingPlan(
        sum_to_one(gates_TE) if renormalize else gates_TE, map_TE, map_TE, scores_TE, logits_TE,
        unclaimed_T=~map_TE.any(dim=1),
    )  # fmt: skip


def logit_places(logits_TE: Tensor, center_E: Tensor, width_E: Tensor) -> Tensor:
    """The place of each logit among the bins of its expert, in [0, 1]."""
    return torch.sigmoid(_STEEPNESS * (logits_TE.detach().float() - center_E) / width_E)


def quantile_thresholds(histogram_EC: Tensor, share: float, center_E: Tensor, width_E: Tensor) -> Tensor:
    """The logit that ``share`` of an expert's tokens exceed, fp32 [E], exact to the width of a bin.

    Args:
        histogram_EC: counts of :func:`logit_places` with the same ``center_E`` and ``width_E``.
        share: of the tokens.
        center_E, width_E: mean and standard deviation of each expert's logits, or estimates of them.
    """
    place_E = kth_largest(histogram_EC, share * histogram_EC[0].sum())
    return (center_E + width_E * torch.logit(place_E, eps=_EDGE) / _STEEPNESS).float()
