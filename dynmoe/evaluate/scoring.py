"""Computes log-probabilities of passages under a model, and the experts that their tokens used.

Shape suffixes besides those of ``dynmoe.routing``: N scored positions, or all passages; G groups.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from dynmoe.evaluate.models import ScoredModel
from dynmoe.moe.layer import capture_plans
from dynmoe.train.scores import EXPERTS, Scores

# Maximum number of logits in a forward pass: 1 GiB in fp32.
_MAX_LOGITS = 2**28
# Called after every forward pass with the number done and the total.
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Passage:
    """Tokens, of which the last ``scored`` are scored given the preceding ones; the model sees all but the last.

    ``group`` is the name under which its experts are counted.
    """

    tokens: Sequence[int]
    scored: int
    group: str


@dataclass(frozen=True)
class Score:
    """Log-probability of a passage's scored tokens in nats, and whether each was the most likely token."""

    log_prob: float
    greedy: bool


class ExpertUse:
    """Experts that the tokens of each group used, averaged over the MoE layers."""

    def __init__(self) -> None:
        self._tokens: dict[str, float] = defaultdict(float)
        self._experts: dict[str, float] = defaultdict(float)

    def add(self, group: str, tokens: float, experts: float) -> None:
        """Adds counts over all layers: ``tokens`` counts a token once per layer."""
        self._tokens[group] += tokens
        self._experts[group] += experts

    def figures(self, groups: Sequence[str]) -> Scores:
        """Experts per token over all of these groups; empty if no MoE layer saw one of their tokens."""
        tokens = sum(self._tokens[group] for group in groups)
        return {EXPERTS: sum(self._experts[group] for group in groups) / tokens} if tokens else {}


def padded_length(model: ScoredModel, length: int) -> int:
    """The length to which sequences of up to ``length`` tokens are padded: a multiple of the parts of a sequence.

    With a window there are only a few lengths, as FlexAttention compiles a kernel for each and then gives up: it would
    hold the weights of all pairs.
    """
    parts = -(-length // model.parts)
    if model.config.model.window is not None:
        parts = min(1 << (parts - 1).bit_length(), model.config.data.sequence_length // model.parts)
    return parts * model.parts


def rows_of_pass(model: ScoredModel, length: int) -> int:
    """Number of sequences of ``length`` tokens in a forward pass, limited by training's batch and by logits."""
    config = model.config
    tokens = min(config.train.micro_batch * config.data.sequence_length, _MAX_LOGITS // model.vocab_size)
    return max(1, tokens // length)


@torch.no_grad()
def score(model: ScoredModel, passages: Sequence[Passage], use: ExpertUse, progress: Progress) -> list[Score]:
    """Scores passages, the longest first. Every rank passes all of them, and gets all scores.

    Each passage has at least two tokens; without the last one it fits a training sequence. Data-parallel ranks share
    the forward passes.

    Args:
        use: receives the experts of every token that the model sees, except padding.
        progress: called after each forward pass.
    """
    groups = sorted({passage.group for passage in passages})
    of_passage_N2 = torch.full((len(passages), 2), -torch.inf, dtype=torch.float64, device=model.device)
    of_group_G2 = torch.zeros(len(groups), 2, dtype=torch.float64, device=model.device)
    passes = _passes(model, passages)
    with capture_plans(model.layers) as plans:
        for first in range(0, len(passes), model.data_size):
            own = first + model.data_rank
            # A rank without work still takes part, because other ranks may need its experts.
            numbers = passes[own] if own < len(passes) else passes[first]
            batch = [passages[number] for number in numbers]
            scores_B2, seen_BS = _score_pass(model, batch)
            if own < len(passes):
                of_passage_N2[numbers] = scores_B2
                group_B = torch.tensor([groups.index(passage.group) for passage in batch], device=model.device)
                seen_BP = seen_BS[:, model.positions(seen_BS.shape[1]).to(model.device)]
                for plan in plans:
                    experts_BP = plan.experts_per_token_T.view_as(seen_BP) * seen_BP
                    counts_B2 = torch.stack([seen_BP.sum(dim=1), experts_BP.sum(dim=1)], dim=1)
                    of_group_G2.index_add_(0, group_B, counts_B2.double())
            plans.clear()
            progress(min(first + model.data_size, len(passes)), len(passes))
    model.reduce(of_passage_N2, dist.ReduceOp.MAX)
    model.reduce(of_group_G2, dist.ReduceOp.SUM)
    for group, (tokens, experts) in zip(groups, of_group_G2.tolist(), strict=True):
        use.add(group, tokens, experts)
    return [Score(log_prob, greedy > 0) for log_prob, greedy in of_passage_N2.tolist()]


def _passes(model: ScoredModel, passages: Sequence[Passage]) -> list[list[int]]:
    """Indices of the passages in each forward pass: of similar length, the longest first, so that OOM shows early."""
    left = sorted(range(len(passages)), key=lambda number: -len(passages[number].tokens))
    passes = []
    while left:
        rows = rows_of_pass(model, padded_length(model, len(passages[left[0]].tokens) - 1))
        passes.append(left[:rows])
        left = left[rows:]
    return passes


def _score_pass(model: ScoredModel, batch: Sequence[Passage]) -> tuple[Tensor, Tensor]:
    """Returns log-probability and whether all tokens were most likely (1 or 0), fp64 [B, 2], and a padding mask [B, S].

    Sequences are padded on the right, which earlier tokens do not see.
    """
    lengths = [len(passage.tokens) - 1 for passage in batch]
    length = padded_length(model, max(lengths))
    tokens_BS = torch.zeros(len(batch), length, dtype=torch.int64)
    labels_BS, seen_BS, wanted_BS = (torch.zeros_like(tokens_BS) for _ in range(3))
    for row, (passage, own) in enumerate(zip(batch, lengths, strict=True)):
        tokens = torch.as_tensor(passage.tokens)
        tokens_BS[row, :own] = tokens[:-1]
        labels_BS[row, :own] = tokens[1:]
        seen_BS[row, :own] = 1
        wanted_BS[row, own - passage.scored : own] = 1
    tokens_BS = tokens_BS.to(model.device)
    labels_BS = labels_BS.to(model.device)
    wanted_BS = wanted_BS.bool().to(model.device)
    seen_BS = seen_BS.bool().to(model.device)
    logits_NV = model.logits(tokens_BS, wanted_BS)
    labels_N = labels_BS[wanted_BS]
    row_N = wanted_BS.nonzero()[:, 0]
    log_prob_N = -F.cross_entropy(logits_NV, labels_N, reduction="none").double()
    misses_N = (logits_NV.argmax(dim=1) != labels_N).double()
    sums_B2 = torch.zeros(len(batch), 2, dtype=torch.float64, device=model.device)
    sums_B2.index_add_(0, row_N, torch.stack([log_prob_N, misses_N], dim=1))
    sums_B2[:, 1] = (sums_B2[:, 1] == 0).double()
    return sums_B2, seen_BS
