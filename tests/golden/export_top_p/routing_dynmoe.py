"""Routing formulas of DynMoE, as they were when these weights were exported. Made by dynmoe.hf."""

from __future__ import annotations

from dataclasses import dataclass
from torch import Tensor
from typing import Any
from typing import Any, Protocol
import dataclasses
import torch
import torch.nn.functional as F


# --- plan
# The one record that every router makes and every consumer reads.


@dataclass(frozen=True)
class RoutingPlan:
    """Which experts compute which tokens, and with what weight.

    Attributes:
        gates_TE: fp32 weights of the expert outputs; 0 where ``routing_map_TE`` is False. Carries gradients.
        routing_map_TE: bool; True where the expert computes the token.
        selected_map_TE: bool; what the router chose before capacity dropped routes (routed + dropped = selected).
        scores_TE: fp32, not negative: softmax probabilities, sigmoid scores or ReLU activations. Carries gradients.
        logits_TE: what went into the softmax; None for routers without one.
        unclaimed_T: bool; tokens that no expert's threshold let in, whether or not a floor gave them one. None for
            routers in which that cannot happen.
        choice_TE: the selection as 0 and 1 in fp32, with the straight-through gradient of top_any; else None.
    """

    gates_TE: Tensor
    routing_map_TE: Tensor
    selected_map_TE: Tensor
    scores_TE: Tensor
    logits_TE: Tensor | None = None
    unclaimed_T: Tensor | None = None
    choice_TE: Tensor | None = None

    @property
    def experts_per_token_T(self) -> Tensor:
        """Number of experts that compute each token, int64 [T]."""
        return self.routing_map_TE.sum(dim=1)

    @property
    def tokens_per_expert_E(self) -> Tensor:
        """Number of tokens that each expert computes, int64 [E]."""
        return self.routing_map_TE.sum(dim=0)

    def keep(self, kept_map_TE: Tensor) -> RoutingPlan:
        """The same plan with the routes outside ``kept_map_TE`` (bool) dropped; the selection stays on record."""
        return dataclasses.replace(
            self,
            gates_TE=self.gates_TE.masked_fill(~kept_map_TE, 0.0),
            routing_map_TE=self.routing_map_TE & kept_map_TE,
        )


@dataclass(frozen=True)
class RoutingCounts:
    """Counts over the tokens of every rank that shares an auxiliary loss. Constants to autograd.

    A loss that multiplies these global counts with means over local tokens has the value and the gradient of the
    same loss over all tokens at once, after the average over ranks that data parallelism takes anyway.

    Attributes:
        selected_E: tokens that selected each expert, fp32.
        num_tokens: tokens, fp32 scalar.
        num_routed_tokens: tokens that selected at least one expert, fp32 scalar.
        num_parts: what the counts were summed over: ranks, times the forward passes of each.
    """

    selected_E: Tensor
    num_tokens: Tensor
    num_routed_tokens: Tensor
    num_parts: int = 1

    @classmethod
    def of(cls, plan: RoutingPlan) -> RoutingCounts:
        """Counts of the tokens of this rank alone."""
        selected_TE = plan.selected_map_TE
        num_tokens = torch.full((), float(selected_TE.shape[0]), device=selected_TE.device)
        return cls(selected_TE.sum(dim=0).float(), num_tokens, selected_TE.any(dim=1).sum().float())

    @classmethod
    def unpack(cls, packed: Tensor, num_parts: int) -> RoutingCounts:
        """The counts of a vector of :meth:`pack`, which may be a sum over ``num_parts`` ranks."""
        return cls(packed[:-2], packed[-2], packed[-1], num_parts)

    def pack(self) -> Tensor:
        """All counts in one vector, [E + 2]."""
        return torch.cat([self.selected_E, self.num_tokens.view(1), self.num_routed_tokens.view(1)])

    def __add__(self, other: RoutingCounts) -> RoutingCounts:
        """Counts over the tokens of both."""
        return RoutingCounts.unpack(self.pack() + other.pack(), self.num_parts + other.num_parts)

    @property
    def tokens_per_rank(self) -> Tensor:
        """Tokens of one rank in one pass."""
        return self.num_tokens / self.num_parts

    @property
    def routed_tokens_per_rank(self) -> Tensor:
        return self.num_routed_tokens.clamp(min=1) / self.num_parts


class Weights(Protocol):
    """Weights of sums over tokens, given counts; constants to autograd."""

    def __call__(self, counts: Any, /) -> Tensor: ...


class LateCounts:
    """Counts that are still on their way between ranks; a loss may be made of them before they arrive.

    Attributes:
        shape: of the tensor that is under way.
    """

    shape: torch.Size

    def weigh(self, sums: Tensor, weights: Weights) -> Tensor:
        """What :func:`weigh` gives: the backward pass waits for the counts, and the value is NaN until they arrive."""
        raise NotImplementedError


def weigh(sums: Tensor, counts: Any, weights: Weights) -> Tensor:
    """Sum of ``weights(counts) * sums``, the form of every loss that counts.

    Args:
        sums: over this rank's tokens, with gradients.
        counts: over the tokens of all ranks; may be :class:`LateCounts`.
        weights: what the counts make of each sum.
    """
    if isinstance(counts, LateCounts):
        return counts.weigh(sums, weights)
    return (weights(counts) * sums).sum()


# --- selection
# What the routers share: ranks of scores, limits of K, and the plans of routers with the same kind of gates.


def sort_descending(scores_TE: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of each token from the best to the worst, and their experts, int64; ties go to the lower expert index.

    ``Tensor.sort(stable=True)`` without gradient. On a CPU NumPy's vectorised sort is 5 to 40 times as fast: an fp32
    score and its expert make one integer of the same order.
    """
    scores_TE = scores_TE.detach()
    if scores_TE.device.type != "cpu" or scores_TE.dtype != torch.float32:
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
    scores_TE: Tensor, threshold: float | Tensor, renormalize: bool, min_experts: int, max_experts: int | None
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
        sum_to_one(gates_TE) if renormalize else gates_TE, map_TE, map_TE, scores_TE,
        unclaimed_T=~passed_TE.any(dim=1),
    )  # fmt: skip


# --- top_k
# Top-k: the fixed number of experts per token that the dynamic routers are measured against.


def top_k(logits_TE: Tensor, k: int, *, renormalize: bool = False, bias_E: Tensor | None = None) -> RoutingPlan:
    """Selects the ``k`` experts of highest probability.

    Args:
        logits_TE: router logits, any float dtype; the softmax is taken in fp32.
        k: experts per token, 1 to E. Ties go to the lower expert index.
        renormalize: make the gates of a token sum to 1.
        bias_E: added to the probabilities where experts are chosen, not to the gates (loss-free balancing,
            arXiv 2408.15664, eq. 3).

    Raises:
        ValueError: ``k`` outside 1 to E.
    """
    num_experts = logits_TE.shape[1]
    if not 1 <= k <= num_experts:
        raise ValueError(f"k={k} must lie between 1 and the number of experts ({num_experts})")
    logits_TE = logits_TE.float()
    probs_TE = torch.softmax(logits_TE, dim=1)
    ranked_TE = probs_TE if bias_E is None else probs_TE.detach() + bias_E
    return softmax_plan(logits_TE, probs_TE, rank_descending(ranked_TE) < k, renormalize)


# --- top_p
# Top-p routing: "Harder Tasks Need More Experts" (arXiv 2403.07652).


def top_p(
    logits_TE: Tensor,
    p: float | Tensor,
    *,
    form: str = "paper",
    renormalize: bool = False,
    min_experts: int = 1,
    max_experts: int | None = None,
) -> RoutingPlan:
    """Selects the fewest experts, best first, whose probabilities add up to ``p`` (section 3.2, eq. 4).

    Args:
        logits_TE: router logits, any float dtype; the softmax is taken in fp32.
        p: mass to reach, in (0, 1]; 1 selects every expert. A tensor of one element is not checked, as that would
            wait for the device: a controller keeps it in range.
        form: ``paper`` stops at a sum of at least p, ``released`` at a sum above p; they differ on exact hits.
        renormalize: make the gates of a token sum to 1; both forms of the paper use raw probabilities.
        min_experts: floor of experts per token, at least 1.
        max_experts: ceiling of experts per token.

    Raises:
        ValueError: a number or form outside its range.
    """
    if not isinstance(p, Tensor) and not 0.0 < p <= 1.0:
        raise ValueError(f"p={p} must lie in (0, 1]")
    if form not in ("paper", "released"):
        raise ValueError(f"form={form!r} must be 'paper' or 'released'")
    if min_experts < 1:
        raise ValueError(f"min_experts={min_experts} must be at least 1: top_p always selects an expert")
    check_limits(logits_TE.shape[1], min_experts, max_experts)
    logits_TE = logits_TE.float()
    probs_TE = torch.softmax(logits_TE, dim=1)
    sorted_TE, order_TE = sort_descending(probs_TE)
    # An expert is kept while the mass of the better ones has not ended the prefix. At p = 1 that takes every expert,
    # those of no mass included.
    better_TE = torch.cat([torch.zeros_like(sorted_TE[:, :1]), sorted_TE[:, :-1].cumsum(dim=1)], dim=1)
    p = torch.as_tensor(p, dtype=torch.float32, device=logits_TE.device)
    keep_TE = (better_TE < p if form == "paper" else better_TE <= p) | (p >= 1.0)
    keep_TE[:, :min_experts] = True
    if max_experts is not None:
        keep_TE[:, max_experts:] = False
    map_TE = torch.zeros_like(keep_TE).scatter_(1, order_TE, keep_TE)
    return softmax_plan(logits_TE, probs_TE, map_TE, renormalize)


# --- top_any
# Top-any gating: DynMoE (arXiv 2405.14297). Every expert has a prototype and a threshold of its own.


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
        form: ``paper`` or ``released``. The released code ignores ``min_experts``, lets a token select nobody in
            training, and gives it the single best score in evaluation.
        training: matters in the released form only.
        scale: the papers' temperature, 1 in the released code; a tensor of one element may carry a gradient.
        straight_through: ``all`` lets the gradient of the step through for every expert (the paper's form),
            ``selected`` only where the expert is selected (the released form: its ReLU ends the others' gradient).
            None: by the form.
        weights: ``uniform`` gates 1/K with K a constant (both forms), or ``score``: s_e times the step.
        renormalize: with ``score``, make the gates of a token sum to 1; uniform ones always do.
        min_experts: floor of experts per token; 0 lets a token select nobody (its output is then 0).
        max_experts: ceiling of experts per token. The best experts of a token, for floor and ceiling, are those that
            exceed their threshold by most; in the released form those of the highest score.

    Raises:
        ValueError: a number, form or choice outside its range, or no active expert (looked for on a CPU only: a GPU
            would be waited for).
    """
    if form not in ("paper", "released"):
        raise ValueError(f"form={form!r} must be 'paper' or 'released'")
    if weights not in ("uniform", "score"):
        raise ValueError(f"weights={weights!r} must be 'uniform' or 'score'")
    if straight_through not in (None, "all", "selected"):
        raise ValueError(f"straight_through={straight_through!r} must be 'all' or 'selected'")
    check_limits(prototypes_DE.shape[1], min_experts, max_experts)
    active_E = active_E.to(torch.bool)
    if active_E.device.type == "cpu" and not active_E.any():
        raise ValueError(f"active_E masks all {len(active_E)} experts off: leave at least one on")
    cosine_TE = F.normalize(hidden_TD.float(), dim=1) @ F.normalize(prototypes_DE.float(), dim=0)
    scores_TE = torch.sigmoid(scale * cosine_TE) * active_E
    margin_TE = scores_TE - torch.sigmoid(scale * thresholds_E.float())
    ranked_TE = (scores_TE if form == "released" else margin_TE).detach()
    if (straight_through or ("all" if form == "paper" else "selected")) == "selected":
        margin_TE = torch.relu(margin_TE)
    step_TE = _StraightThroughStep.apply(margin_TE)

    map_TE = (step_TE.detach() > 0) & active_E
    unclaimed_T = ~map_TE.any(dim=1)
    rank_TE = rank_descending(ranked_TE.masked_fill(~active_E, -torch.inf))
    if form == "released":
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


# --- sigmoid
# A sigmoid gate for each expert by itself, with a cut-off.


def sigmoid_cutoff(
    logits_TE: Tensor,
    cutoff: float | Tensor = 0.5,
    *,
    renormalize: bool = False,
    min_experts: int = 1,
    max_experts: int | None = None,
) -> RoutingPlan:
    """Selects every expert whose sigmoid score exceeds the cut-off; the gates are the scores.

    Args:
        logits_TE: router logits, any float dtype; the sigmoid is taken in fp32.
        cutoff: in [0, 1), one for all experts or a tensor [E] with one for each (not checked).
        renormalize: make the gates of a token sum to 1.
        min_experts: floor of experts per token; 0 lets a token select nobody (its output is then 0).
        max_experts: ceiling of experts per token; the best are those that exceed their cut-off by most.

    Raises:
        ValueError: a number outside its range.
    """
    if not isinstance(cutoff, Tensor) and not 0.0 <= cutoff < 1.0:
        raise ValueError(f"cutoff={cutoff} must lie in [0, 1)")
    check_limits(logits_TE.shape[1], min_experts, max_experts)
    scores_TE = torch.sigmoid(logits_TE.float())
    return threshold_plan(scores_TE, cutoff, renormalize, min_experts, max_experts)


# --- relu
# ReLU routing: ReMoE (arXiv 2412.14711). Fully differentiable; an adaptive L1 penalty holds the budget.


def relu(logits_TE: Tensor, *, max_experts: int | None = None) -> RoutingPlan:
    """Selects every expert of positive logit; the gates are the logits (eq. 5).

    A token without a positive logit selects nobody: a floor would add an expert of gate 0.

    Args:
        logits_TE: router logits, any float dtype.
        max_experts: ceiling of experts per token, by logit.

    Raises:
        ValueError: ``max_experts`` below 1.
    """
    check_limits(logits_TE.shape[1], 0, max_experts)
    scores_TE = torch.relu(logits_TE.float())
    return threshold_plan(scores_TE, 0.0, False, 0, max_experts)


def adapt_l1(coefficient: Tensor, experts_per_token: Tensor, target: float, factor: float = 1.2) -> Tensor:
    """The coefficient of the L1 penalty after a step: times ``factor`` where too many experts were used, else divided.

    eq. 9 of the paper, whose sparsity is 1 - K / E; kept within [1e-10, 100], so that it comes back soon from a target
    that was out of reach for long.
    """
    return (coefficient * factor ** torch.sign(experts_per_token - target)).clamp(1e-10, 1e2)


# --- null_experts
# Null experts: AdaMoE (arXiv 2406.13233). Top-k over real experts and some that cost and do nothing.


def null_experts(logits_TX: Tensor, k: int, num_null: int, *, renormalize: bool = True) -> RoutingPlan:
    """Selects the ``k`` experts of highest probability, null ones among them; the plan holds the real ones.

    Args:
        logits_TX: logits of E real experts, then of ``num_null`` null experts; the softmax is taken in fp32.
        k: slots per token that real and null experts share, 1 to X. Ties go to the lower index.
        num_null: null experts, at least 1.
        renormalize: make the gates of the real experts of a token sum to 1, as the paper does.

    Raises:
        ValueError: a number outside its range.
    """
    num_all = logits_TX.shape[1]
    if not 1 <= num_null < num_all:
        raise ValueError(f"num_null={num_null} must lie between 1 and the number of logits ({num_all}) less one")
    if not 1 <= k <= num_all:
        raise ValueError(f"k={k} must lie between 1 and the number of experts, null ones included ({num_all})")
    logits_TX = logits_TX.float()
    probs_TX = torch.softmax(logits_TX, dim=1)
    real = slice(0, num_all - num_null)
    map_TE = (rank_descending(probs_TX.detach()) < k)[:, real]
    scores_TE = probs_TX[:, real]
    gates_TE = scores_TE.masked_fill(~map_TE, 0.0)
    return RoutingPlan(
        sum_to_one(gates_TE) if renormalize else gates_TE, map_TE, map_TE, scores_TE, logits_TX,
        unclaimed_T=~map_TE.any(dim=1),
    )  # fmt: skip


def null_balance(plan: RoutingPlan, k: int, num_null: int, counts: RoutingCounts | LateCounts | None = None) -> Tensor:
    """The switch loss over real and null experts, the load of the null ones averaged over them (section 3.3).

    1 at perfect balance. What the null experts get follows from the real ones: k slots per token, probabilities that
    sum to 1.
    """
    num_tokens, num_experts = plan.scores_TE.shape

    def weights_X(counts: RoutingCounts) -> Tensor:
        share_E = counts.selected_E / (k * counts.num_tokens)
        null_share = (1.0 - share_E.sum()) / num_null
        return (num_experts + num_null) * torch.cat([share_E, null_share.view(1)]) / counts.tokens_per_rank

    score_sums_E = plan.scores_TE.sum(dim=0)
    # The probability of the null experts together, last in X: what the others leave of 1 for each token.
    score_sums_X = torch.cat([score_sums_E, (num_tokens - score_sums_E.sum()).view(1)])
    return weigh(score_sums_X, RoutingCounts.of(plan) if counts is None else counts, weights_X)


# --- expert_threshold
# Expert-threshold routing (arXiv 2603.11535): each expert lets in the tokens above a moving average of its own.
#
# What an expert would take in expert choice, its k best tokens of a batch, is remembered as the score of the k-th of
# them. A token then needs to know of no other token, in training or in inference.


# Scores lie in [0, 1]; counts of bins can be summed over ranks and micro-batches, the scores themselves cannot.
NUM_BINS = 2048


def expert_threshold(
    logits_TE: Tensor,
    cutoffs_E: Tensor,
    *,
    renormalize: bool = False,
) -> RoutingPlan:
    """Selects every expert whose sigmoid score exceeds that expert's cut-off; the gates are the scores.

    Args:
        logits_TE: router logits, any float dtype.
        cutoffs_E: fp32, the moving averages of :func:`move_cutoffs`.
        renormalize: make the gates of a token sum to 1.

    A token above no cut-off selects nobody: a floor or a ceiling would break the count that the cut-offs stand for.
    """
    return sigmoid_cutoff(logits_TE, cutoffs_E, renormalize=renormalize, min_experts=0)


@torch.no_grad()
def score_histogram(scores_TE: Tensor) -> Tensor:
    """Tokens by expert and bin of their score, int64 [E, NUM_BINS]."""
    num_experts = scores_TE.shape[1]
    # What is no number is told of elsewhere, with its layer and rank; here it counts as 0.
    bins_TE = (scores_TE.detach().nan_to_num(0.0) * NUM_BINS).long().clamp(max=NUM_BINS - 1)
    bins_TE += torch.arange(num_experts, device=scores_TE.device) * NUM_BINS
    # Not bincount, which waits for the device to know its size.
    counts = torch.zeros(num_experts * NUM_BINS, dtype=torch.int64, device=scores_TE.device)
    counts.scatter_add_(0, bins_TE.flatten(), torch.ones_like(bins_TE).flatten())
    return counts.view(num_experts, NUM_BINS)


def kth_largest(histogram_EB: Tensor, k: Tensor) -> Tensor:
    """Score of the k-th best token of each expert, fp64 [E], linear within its bin: exact to 1 / NUM_BINS.

    Args:
        histogram_EB: counts of :func:`score_histogram`, summed over whatever tokens are meant.
        k: how many tokens an expert is to take, a scalar; it need not be whole.
    """
    above_EB = histogram_EB.flip(1).cumsum(1).flip(1).double()  # tokens in this bin or a better one
    k = k.double().clamp(min=torch.finfo(torch.float64).tiny)
    place_E = (above_EB >= k).sum(dim=1).clamp(min=1) - 1  # the best bin with k tokens in it or above
    inside_E = histogram_EB.gather(1, place_E[:, None]).squeeze(1).double()
    better_E = above_EB.gather(1, place_E[:, None]).squeeze(1) - inside_E
    fraction_E = ((k - better_E) / inside_E.clamp(min=1)).clamp(0.0, 1.0)
    return (place_E + 1.0 - fraction_E) / NUM_BINS


def move_cutoffs(cutoffs_E: Tensor, kth_largest_E: Tensor, decay: float) -> Tensor:
    """c <- decay * c + (1 - decay) * (k-th largest score)."""
    return cutoffs_E * decay + kth_largest_E.to(cutoffs_E.dtype) * (1.0 - decay)


# --- losses
# Auxiliary losses of the router: pure functions, each a scalar without its coefficient.
#
# Counts come in as :class:`RoutingCounts`, summed over ranks by the caller; see there why the gradient then does not
# depend on the layout. ``counts=None`` takes the plan's own tokens for all there are. A loss of the load is a sum over
# this rank's tokens, weighed by what the counts say (:func:`weigh`): the balance losses and L1 therefore take counts that
# are still under way, :class:`LateCounts`, too.


def load_balance(
    plan: RoutingPlan, counts: RoutingCounts | LateCounts | None = None, *, per_route: bool = False
) -> Tensor:
    """E * sum_e f_e Q_e (arXiv 2403.07652, eq. 6): f_e fraction of tokens that select e, Q_e its mean score.

    At perfect balance of probabilities it is the mean number of experts per token, K; ``per_route`` divides by that
    K (a constant), which gives the switch loss of a top-k router.
    """
    num_experts = plan.scores_TE.shape[1]

    def weights_E(counts: RoutingCounts) -> Tensor:
        fraction_E = counts.selected_E / (counts.selected_E.sum().clamp(min=1) if per_route else counts.num_tokens)
        return num_experts * fraction_E / counts.tokens_per_rank

    return weigh(plan.scores_TE.sum(dim=0), RoutingCounts.of(plan) if counts is None else counts, weights_E)


def sequence_counts(plan: RoutingPlan, num_sequences: int) -> Tensor:
    """Tokens of each sequence that select each expert, fp32 [B, E]; tokens of a sequence stand together.

    Raises:
        ValueError: the tokens are not a multiple of ``num_sequences``.
    """
    num_tokens, num_experts = plan.selected_map_TE.shape
    if num_sequences < 1 or num_tokens % num_sequences:
        raise ValueError(f"num_sequences={num_sequences} must divide the number of tokens ({num_tokens})")
    return plan.selected_map_TE.view(num_sequences, -1, num_experts).float().sum(dim=1)


def sequence_balance(
    plan: RoutingPlan, selected_BE: Tensor | LateCounts, num_parts: int = 1, *, per_route: bool = False
) -> Tensor:
    """Mean over sequences of :func:`load_balance` within each.

    Args:
        plan: of the tokens that this rank has of each sequence.
        selected_BE: :func:`sequence_counts`, summed over the ranks that have the rest of the sequences.
        num_parts: number of those ranks; the mean over them is meant.
        per_route: divide by the experts per token of each sequence.
    """
    num_sequences, num_experts = selected_BE.shape
    mean_score_BE = plan.scores_TE.view(num_sequences, -1, num_experts).mean(dim=1)
    length = num_parts * (plan.scores_TE.shape[0] // num_sequences)

    def weights_BE(selected_BE: Tensor) -> Tensor:
        total_B1 = selected_BE.sum(dim=1, keepdim=True).clamp(min=1) if per_route else length
        return num_experts / num_sequences * (selected_BE / total_B1)

    return weigh(mean_score_BE, selected_BE, weights_BE)


def gate_balance(
    plan: RoutingPlan,
    counts: RoutingCounts | LateCounts | None = None,
    *,
    active_E: Tensor | None = None,
    per_route: bool = False,
) -> Tensor:
    """E^2 * mean_e(me_e * ce_e), DynMoE's released balance term (January 2025).

    Over the tokens that selected somebody: me is the mean of their gates normalised to sum 1, ce the fraction that
    selects each expert. With E the number of active experts it is K at perfect balance, as :func:`load_balance` is;
    ``active_E=None`` counts every slot, as the released code does. ``per_route`` divides by K.
    """
    num_experts = plan.gates_TE.shape[1] if active_E is None else active_E.sum()

    def weights_E(counts: RoutingCounts) -> Tensor:
        total = counts.selected_E.sum() if per_route else counts.num_routed_tokens
        return num_experts * (counts.selected_E / total.clamp(min=1)) / counts.routed_tokens_per_rank

    gate_sums_E = sum_to_one(plan.gates_TE).sum(dim=0)
    return weigh(gate_sums_E, RoutingCounts.of(plan) if counts is None else counts, weights_E)


def choice_balance(plan: RoutingPlan, active_E: Tensor, counts: RoutingCounts | LateCounts | None = None) -> Tensor:
    """Squared coefficient of variation of the load of active experts, through the straight-through choice.

    The load loss of arXiv 1701.06538 (eq. 11) with DynMoE's choice in place of its noisy estimate. The gradient of an
    expert's choice is its excess load: the threshold of one that nobody selects falls.

    Raises:
        ValueError: the plan's router passes no gradient through its choice.
    """
    if plan.choice_TE is None:
        raise ValueError("choice_balance needs a router that passes a gradient through its choice (top_any)")
    active = active_E.float()
    num_active = active.sum()

    def weights_E(counts: RoutingCounts) -> Tensor:
        total = counts.selected_E.sum().clamp(min=1)
        excess_E = (counts.selected_E * num_active / total - 1.0) * active
        return excess_E / counts.tokens_per_rank * counts.num_tokens / total

    return weigh(plan.choice_TE.sum(dim=0), RoutingCounts.of(plan) if counts is None else counts, weights_E)


def l1(plan: RoutingPlan, target: float, counts: RoutingCounts | LateCounts | None = None) -> Tensor:
    """Sum over experts of f_e * (mean score), f_e = E / target * (fraction that selects e): ReMoE's penalty (eq. 13).

    f is what balances the load; it is a constant, 1 for an expert with its share of ``target`` experts per token.
    """
    scale = plan.scores_TE.shape[1] / target

    def weights_E(counts: RoutingCounts) -> Tensor:
        return scale * counts.selected_E / counts.num_tokens / counts.tokens_per_rank

    return weigh(plan.scores_TE.sum(dim=0), RoutingCounts.of(plan) if counts is None else counts, weights_E)


def entropy(plan: RoutingPlan, counts: RoutingCounts | None = None) -> Tensor:
    """Mean over tokens of the entropy of the scores, in nats (arXiv 2403.07652, eq. 5): what makes K shrink."""
    tokens = plan.scores_TE.shape[0] if counts is None else counts.tokens_per_rank
    # xlogy is 0 at probability 0, gradient included.
    return (
        -torch.special.xlogy(plan.scores_TE, plan.scores_TE.clamp(min=torch.finfo(torch.float32).tiny)).sum() / tokens
    )


def z_loss(plan: RoutingPlan, counts: RoutingCounts | None = None) -> Tensor:
    """Mean over tokens of logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906, eq. 5).

    Raises:
        ValueError: the plan's router has no logits.
    """
    if plan.logits_TE is None:
        raise ValueError("z_loss needs a router with logits (top_k or top_p)")
    tokens = plan.logits_TE.shape[0] if counts is None else counts.tokens_per_rank
    return plan.logits_TE.logsumexp(dim=1).square().sum() / tokens


def diversity(prototypes_DE: Tensor, active_E: Tensor) -> Tensor:
    """Frobenius norm of (W^T W - I) over pairs of active experts, W with unit columns (arXiv 2405.14297, eq. 8)."""
    unit_DE = F.normalize(prototypes_DE.float(), dim=0)
    mask_E = active_E.to(unit_DE.dtype)
    gram_EE = unit_DE.T @ unit_DE - torch.eye(unit_DE.shape[1], device=unit_DE.device)
    return torch.linalg.matrix_norm(gram_EE * torch.outer(mask_E, mask_E))


def simplicity(prototypes_DE: Tensor, active_E: Tensor | None = None) -> Tensor:
    """Mean norm of the prototypes of active experts (arXiv 2405.14297, eq. 8).

    ``active_E=None`` takes every slot, as the released code does.
    """
    norm_E = prototypes_DE.float().norm(dim=0)
    if active_E is None:
        return norm_E.mean()
    return torch.where(active_E.to(torch.bool), norm_E, 0.0).sum() / active_E.sum()


def efficiency(plan: RoutingPlan, counts: RoutingCounts | None = None, *, active_E: Tensor | None = None) -> Tensor:
    """Mean over tokens and active experts of the 0/1 choice, with its straight-through gradient.

    ``active_E=None`` counts every slot, as DynMoE's released code does.

    Raises:
        ValueError: the plan's router passes no gradient through its choice.
    """
    if plan.choice_TE is None:
        raise ValueError("efficiency needs a router that passes a gradient through its choice (top_any)")
    tokens = plan.choice_TE.shape[0] if counts is None else counts.tokens_per_rank
    return plan.choice_TE.sum() / (tokens * (plan.choice_TE.shape[1] if active_E is None else active_E.sum()))


def released_top_any_loss(plan: RoutingPlan, prototypes_DE: Tensor, active_E: Tensor) -> Tensor:
    """The whole auxiliary loss of DynMoE's released code: diversity, simplicity, balance and efficiency, each × 1."""
    parameters = diversity(prototypes_DE, active_E) + simplicity(prototypes_DE)
    return parameters + gate_balance(plan) + efficiency(plan)
