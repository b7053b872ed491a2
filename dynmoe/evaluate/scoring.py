"""Log-probabilities of passages under a model, and the experts that their tokens used."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from dynmoe.evaluate.models import ScoredModel
from dynmoe.moe.observation import keeping_plans
from dynmoe.train.scores import EXPERTS, Scores

# Numbers in the logits of one pass: 1 GiB of fp32.
_MOST_LOGITS = 2**28
# Is told of every pass: how many are done, and of how many.
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Passage:
    """Tokens of which the last ``scored`` are scored, each given those before it; the model sees all but the last.

    ``group`` names what its experts are counted for.
    """

    tokens: Sequence[int]
    scored: int
    group: str


@dataclass(frozen=True)
class Score:
    """Of a passage: log-probability of its scored tokens in nats, and whether each of them was the likeliest."""

    log_prob: float
    greedy: bool


class ExpertUse:
    """Experts that the tokens of each group used, in the mean of the MoE layers."""

    def __init__(self) -> None:
        self._tokens: dict[str, float] = defaultdict(float)
        self._experts: dict[str, float] = defaultdict(float)

    def add(self, group: str, tokens: float, experts: float) -> None:
        """``tokens`` counts a token once for each layer, as ``experts`` does."""
        self._tokens[group] += tokens
        self._experts[group] += experts

    def figures(self, groups: Sequence[str]) -> Scores:
        """Experts per token over all of these groups; nothing where no MoE layer saw one of their tokens."""
        tokens = sum(self._tokens[group] for group in groups)
        return {EXPERTS: sum(self._experts[group] for group in groups) / tokens} if tokens else {}


def rows_of_pass(model: ScoredModel, length: int) -> int:
    """Sequences of ``length`` tokens in one pass: no more than in training, and no more logits than fit."""
    config = model.config
    tokens = min(config.train.micro_batch * config.data.sequence_length, _MOST_LOGITS // model.vocab_size)
    return max(1, tokens // length)


@torch.no_grad()
def score(model: ScoredModel, passages: Sequence[Passage], use: ExpertUse, progress: Progress) -> list[Score]:
    """Scores passages, the longest first; every rank gives all of them, and gets all scores.

    Each has two tokens or more, and all but the last fit the sequences of the training. Ranks that read different
    data share the passes among them.

    Args:
        model: the model.
        passages: what is scored.
        use: gets the experts of every token that the model sees, padding left out.
        progress: is told of each pass.
    """
    groups = sorted({passage.group for passage in passages})
    of_passage_N2 = torch.full((len(passages), 2), -torch.inf, dtype=torch.float64, device=model.device)
    of_group_G2 = torch.zeros(len(groups), 2, dtype=torch.float64, device=model.device)
    passes = _passes(model, passages)
    with keeping_plans(model.layers) as plans:
        for first in range(0, len(passes), model.data_size):
            own = first + model.data_rank
            # A rank that has nothing left takes part all the same: the experts of others are asked for.
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
    """Numbers of the passages of each pass: of like length, the longest first, as what is too large fails at once."""
    left = sorted(range(len(passages)), key=lambda number: -len(passages[number].tokens))
    passes = []
    while left:
        rows = rows_of_pass(model, len(passages[left[0]].tokens))
        passes.append(left[:rows])
        left = left[rows:]
    return passes


def _score_pass(model: ScoredModel, batch: Sequence[Passage]) -> tuple[Tensor, Tensor]:
    """Log-probability and whether all was likeliest (1 or 0), fp64 [B, 2]; and which positions are no padding, [B, S].

    Sequences are padded on the right, where no token sees it.
    """
    lengths = [len(passage.tokens) - 1 for passage in batch]
    length = -(-max(lengths) // model.parts) * model.parts
    tokens_BS = torch.zeros(len(batch), length, dtype=torch.int64)
    labels_BS, seen_BS, wanted_BS = (torch.zeros_like(tokens_BS) for _ in range(3))
    for row, (passage, own) in enumerate(zip(batch, lengths, strict=True)):
        tokens = torch.as_tensor(passage.tokens)
        tokens_BS[row, :own], labels_BS[row, :own] = tokens[:-1], tokens[1:]
        seen_BS[row, :own] = 1
        wanted_BS[row, own - passage.scored : own] = 1
    tokens_BS, labels_BS = tokens_BS.to(model.device), labels_BS.to(model.device)
    wanted_BS, seen_BS = wanted_BS.bool().to(model.device), seen_BS.bool().to(model.device)
    logits_NV, labels_N = model.logits(tokens_BS, wanted_BS), labels_BS[wanted_BS]
    row_N = wanted_BS.nonzero()[:, 0]
    log_prob_N = -F.cross_entropy(logits_NV, labels_N, reduction="none").double()
    misses_N = (logits_NV.argmax(dim=1) != labels_N).double()
    sums_B2 = torch.zeros(len(batch), 2, dtype=torch.float64, device=model.device)
    sums_B2.index_add_(0, row_N, torch.stack([log_prob_N, misses_N], dim=1))
    sums_B2[:, 1] = (sums_B2[:, 1] == 0).double()
    return sums_B2, seen_BS
