"""Top-k: a fixed number of experts per token, the baseline of the dynamic routers."""

from __future__ import annotations

import torch
from torch import Tensor

from dynmoe.routing.histogram import distances_at, kth_largest, log_places, score_histogram
from dynmoe.routing.plan import RoutingPlan
from dynmoe.routing.selection import rank_descending, softmax_plan


def top_k(logits_TE: Tensor, k: int, *, renormalize: bool = False, bias_E: Tensor | None = None) -> RoutingPlan:
    """Selects the ``k`` experts of highest probability.

    Args:
        logits_TE: router logits, any float dtype; the softmax is in fp32.
        k: experts per token, 1 to E. Ties go to the lower expert index.
        renormalize: make the gates of a token sum to 1.
        bias_E: added to the probabilities for the selection, not for the gates (loss-free balancing, arXiv 2408.15664,
            eq. 3).

    Raises:
        ValueError: ``k`` is not between 1 and E.
    """
    num_experts = logits_TE.shape[1]
    if not 1 <= k <= num_experts:
        raise ValueError(f"k={k} must be between 1 and the number of experts ({num_experts})")
    logits_TE = logits_TE.float()
    probs_TE = torch.softmax(logits_TE, dim=1)
    ranked_TE = probs_TE if bias_E is None else probs_TE.detach() + bias_E
    return softmax_plan(logits_TE, probs_TE, rank_descending(ranked_TE) < k, renormalize)


def margin_histogram(scores_TE: Tensor, bias_E: Tensor, k: int) -> Tensor:
    """Number of tokens by expert and bin of the expert's margin, int64 [E, C].

    The margin is the biased score minus the highest one that is not selected; those of selected experts are above 0.
    """
    ranked_TE = scores_TE.detach() + bias_E
    runner_up = min(k, ranked_TE.shape[1] - 1)
    cutoff_T1 = ranked_TE.topk(runner_up + 1, dim=1).values[:, -1:]
    return score_histogram(log_places(ranked_TE - cutoff_T1))


def quantile_bias(bias_E: Tensor, histogram_EC: Tensor, k: int) -> Tensor:
    """The biases with which each expert exceeds the cut-offs of k / E of the tokens, fp64 [E].

    Quantile balancing (https://kexue.fm/archives/11619): the bias becomes the k/E-quantile of cut-off minus score. The
    cut-offs depend on the biases, so the loads are equal only after a few steps.

    Args:
        bias_E: the current biases.
        histogram_EC: sum of :func:`margin_histogram` over all tokens of a step with these biases.
        k: experts per token.
    """
    tokens = histogram_EC[0].sum() * (k / len(bias_E))
    return bias_E - distances_at(kth_largest(histogram_EC, tokens))
