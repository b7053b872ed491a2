"""Experts and losses of single tokens of validation text, and how they go together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from dynmoe.data.batches import PretrainingData
from dynmoe.moe.layer import capture_plans
from dynmoe.trained import TrainedModel

_BINS = 10
# Means of token ids that occur less often in the text read are too noisy to take them off.
_FEW = 10


@dataclass(frozen=True)
class Tokens:
    """Tokens of validation text in evaluation mode.

    Attributes:
        ids_N: token ids.
        position_N: position in the sequence.
        experts_N: experts, mean over MoE layers.
        next_loss_N: loss of the next token, which the model predicts with these experts, in nats.
        own_loss_N: loss of the token itself; nan for the first of a sequence.
    """

    ids_N: NDArray[np.int64]
    position_N: NDArray[np.int64]
    experts_N: NDArray[np.float64]
    next_loss_N: NDArray[np.float64]
    own_loss_N: NDArray[np.float64]


@torch.no_grad()
def read_tokens(model: TrainedModel, data: PretrainingData, sequences: int) -> Tokens:
    """Runs the model over the first ``sequences`` validation sequences, or all if fewer."""
    sequences = min(sequences, data.validation_samples)
    rows = model.config.train.micro_batch
    found: list[tuple[torch.Tensor, ...]] = []
    for first in range(0, sequences, rows):
        batch = data.validation_batch(range(first, min(first + rows, sequences))).to(model.device)
        with capture_plans(model.decoder.moe_layers) as plans:
            logits_BSV = model.decoder(batch.tokens_BS)
        loss_BS = F.cross_entropy(logits_BSV.transpose(1, 2).float(), batch.labels_BS, reduction="none")
        own_BS = F.pad(loss_BS[:, :-1], (1, 0), value=float("nan"))
        experts_BS = torch.stack([plan.experts_per_token_T for plan in plans]).double().mean(dim=0).view_as(loss_BS)
        position_BS = torch.arange(loss_BS.shape[1], device=model.device).expand_as(loss_BS)
        found.append((batch.tokens_BS, position_BS, experts_BS, loss_BS.double(), own_BS.double()))
    return Tokens(*(torch.cat(parts).flatten().cpu().numpy() for parts in zip(*found, strict=True)))


def associations(tokens: Tokens, rarity_N: NDArray[np.int64]) -> dict[str, float]:
    """Rank correlations of the experts of tokens, by what they are correlated with, and ``share_of_token``."""
    known = ~np.isnan(tokens.own_loss_N)
    _, id_N, count_I = np.unique(tokens.ids_N, return_inverse=True, return_counts=True)
    often = count_I[id_N] >= _FEW
    rest_N, share = _without_means(tokens.experts_N[often], id_N[often])
    loss_rest_N, _ = _without_means(tokens.next_loss_N[often], id_N[often])
    return {
        "loss": _rank(tokens.experts_N, tokens.next_loss_N),
        "surprise": _rank(tokens.experts_N[known], tokens.own_loss_N[known]),
        "rarity": _rank(tokens.experts_N, rarity_N),
        "position": _rank(tokens.experts_N, tokens.position_N),
        "loss_within_token": _rank(rest_N, loss_rest_N),
        "loss_of_sequence": _rank(
            means_by_sequence(tokens, tokens.experts_N), means_by_sequence(tokens, tokens.next_loss_N)
        ),
        "share_of_token": round(share, 4),
    }


def means_by_sequence(tokens: Tokens, values_N: NDArray[np.float64]) -> list[float]:
    """Mean of the values over the tokens of each sequence, in the order of the text."""
    return [round(float(mean), 4) for mean in _means_by(np.cumsum(tokens.position_N == 0) - 1, values_N)]


def _rank(first_N: ArrayLike, second_N: ArrayLike) -> float:
    """Spearman's rank correlation."""
    return round(float(stats.spearmanr(first_N, second_N).statistic), 4)


def _without_means(values_N: NDArray[np.float64], id_N: NDArray[np.int64]) -> tuple[NDArray[np.float64], float]:
    """The values less the mean of their id, and the share of the variance that the means explain."""
    rest_N = values_N - _means_by(id_N, values_N)[id_N]
    return rest_N, float(1 - rest_N.var() / values_N.var())


def _means_by(group_N: NDArray[np.int64], values_N: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean of the values of each group, by its number; 0 for one without values."""
    return np.bincount(group_N, values_N) / np.maximum(np.bincount(group_N), 1)


def by_bins(experts_N: NDArray[np.float64], values_N: NDArray[Any]) -> list[float]:
    """Mean experts of ten equal parts of the tokens, by ascending value (ties in the order of the text)."""
    ordered_N = experts_N[np.argsort(values_N, kind="stable")]
    return [round(float(part_N.mean()), 4) for part_N in np.array_split(ordered_N, _BINS)]
