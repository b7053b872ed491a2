"""Top-k: a fixed number of experts per token, the baseline of the dynamic routers."""

from __future__ import annotations

from torch import Tensor

from dynmoe.routing.groups import within_best_groups
from dynmoe.routing.histogram import distances_at, kth_largest, log_places, score_histogram
from dynmoe.routing.plan import RoutingPlan
from dynmoe.routing.selection import rank_descending, softmax_plan


def top_k(
    logits_TE: Tensor, k: int, *, renormalize: bool = False, bias_E: Tensor | None = None,
    score_function: str = "softmax", n_group: int = 1, topk_group: int = 1,
) -> RoutingPlan:  # fmt: skip
    """Selects the ``k`` experts of highest score.

    Args:
        logits_TE: router logits, any float dtype; the scores are in fp32.
        k: experts per token, 1 to the number of experts in ``topk_group`` groups. Ties go to the lower expert index.
        renormalize: make the gates of a token sum to 1.
        bias_E: added to the scores for the selection, not for the gates (loss-free balancing, arXiv 2408.15664, eq. 3).
        score_function: ``softmax``, or ``sigmoid`` (DeepSeek-V3, arXiv 2412.19437, eq. 12 to 16).
        n_group, topk_group: select within the groups of best biased scores (:func:`within_best_groups`).

    Raises:
        ValueError: a number is out of range, or the function is unknown.
    """
    most = logits_TE.shape[1] * topk_group // n_group
    if not 1 <= k <= most:
        raise ValueError(f"k={k} must be between 1 and the number of experts that a token may use ({most})")
    if score_function not in ("softmax", "sigmoid"):
        raise ValueError(f"score_function={score_function!r} must be 'softmax' or 'sigmoid'")
    logits_TE = logits_TE.float()
    scores_TE = logits_TE.softmax(dim=1) if score_function == "softmax" else logits_TE.sigmoid()
    ranked_TE = scores_TE.detach() if bias_E is None else scores_TE.detach() + bias_E
    map_TE = rank_descending(within_best_groups(ranked_TE, n_group, topk_group)) < k
    return softmax_plan(logits_TE, scores_TE, map_TE, renormalize)


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
