"""Quantile routing (https://kexue.fm/archives/11626): each expert takes its share of the tokens, those of best score.

Quantiles come from histograms, whose counts can be summed over ranks.
"""

from __future__ import annotations

from torch import Tensor

from dynmoe.routing.histogram import distances_at, kth_largest, log_places, score_histogram
from dynmoe.routing.plan import RoutingPlan
from dynmoe.routing.selection import sum_to_one


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


def quantile_histogram(logits_TE: Tensor, thresholds_E: Tensor, num_bins: int) -> Tensor:
    """Number of tokens by expert and bin of their logit's distance from the expert's last threshold, int64 [E, C]."""
    return score_histogram(log_places(logits_TE - thresholds_E), num_bins)


def quantile_thresholds(histogram_EC: Tensor, share: float, thresholds_E: Tensor) -> Tensor:
    """The logit that ``share`` of an expert's tokens exceed, fp32 [E], exact to the width of a bin.

    Args:
        histogram_EC: sum of :func:`quantile_histogram` with the same ``thresholds_E`` over all tokens.
        share: of the tokens.
        thresholds_E: the last thresholds, or any other estimate.
    """
    place_E = kth_largest(histogram_EC, share * histogram_EC[0].sum())
    return (thresholds_E + distances_at(place_E)).float()
