"""Validation sequences read from each corpus of a run, and the weights of their losses."""

from __future__ import annotations

from collections.abc import Sequence

from dynmoe.config import Config
from dynmoe.data.corpus import Corpus, by_domain, source_names
from dynmoe.errors import ConfigError


def training_shares(corpora: Sequence[Corpus], weights: Sequence[float]) -> dict[str, float]:
    """Share of each domain in training, summing to 1: its ``weights``, or training tokens if there are no weights."""
    return _shares(corpora, weights or [corpus.splits["train"].num_tokens for corpus in corpora])


def validation_shares(corpora: Sequence[Corpus]) -> dict[str, float]:
    """Share of each domain in the validation tokens, summing to 1."""
    return _shares(corpora, [corpus.splits["validation"].num_tokens for corpus in corpora])


def _shares(corpora: Sequence[Corpus], weights: Sequence[float]) -> dict[str, float]:
    """Weights by domain, normalized; those of a corpus that a blend lists twice are added."""
    names = source_names([str(corpus.path) for corpus in corpora])
    shares = dict[str, float]()
    for corpus, weight in zip(corpora, weights, strict=True):
        name = names[str(corpus.path)]
        shares[name] = shares.get(name, 0.0) + weight / sum(weights)
    return shares


def is_weighted(config: Config, corpora: Sequence[Corpus]) -> bool:
    """Whether the validation loss on these ``corpora`` is measured per domain and weighted as in training."""
    return config.eval.weighting == "blend" and len(by_domain(corpora)) > 1


def sequences_by_domain(config: Config, corpora: Sequence[Corpus], data_size: int = 1) -> dict[str, int]:
    """Number of validation sequences per domain for an evaluation that is weighted as in training.

    ``eval.batches`` global batches, or all data if there is less, are split like training batches. Each domain gets
    whole micro-batches, at least one; together they fill whole forward passes of all ranks.

    Args:
        data_size: number of ranks that read different sequences.

    Raises:
        ConfigError: a domain, or the evaluation, is too small.
    """
    rows = config.train.micro_batch
    length = config.data.sequence_length
    limits = {name: corpus.sequences("validation", length) // rows for name, corpus in by_domain(corpora).items()}
    for name, limit in limits.items():
        if limit == 0:
            problem = f"the validation data of {name} does not fill one micro-batch"
            cure = "use a smaller value, more text, or eval.weighting=tokens"
            raise ConfigError("train.micro_batch", rows, problem, cure)
    wanted = config.eval.batches * config.train.global_batch // rows
    most = sum(limits.values())
    total = min(wanted, most) // data_size * data_size
    if total < len(limits):
        problem = f"gives {total} micro-batches, fewer than there are corpora ({len(limits)})"
        larger = "a larger value, " if wanted < most else ""
        cure = f"use {larger}a smaller train.micro_batch, more text, or eval.weighting=tokens"
        raise ConfigError("eval.batches", config.eval.batches, problem, cure)
    counts = apportion(total, training_shares(corpora, config.data.weights), limits)
    return {name: count * rows for name, count in counts.items()}


def apportion(total: int, shares: dict[str, float], limits: dict[str, int]) -> dict[str, int]:
    """Splits ``total`` in proportion to ``shares`` by the Sainte-Laguë method: each at least 1, at most its limit.

    ``total`` is at least the number of shares and at most the sum of the limits.
    """
    counts = dict.fromkeys(shares, 1)
    for _ in range(total - len(counts)):
        open_names = [name for name in counts if counts[name] < limits[name]]
        counts[max(open_names, key=lambda name: shares[name] / (2 * counts[name] + 1))] += 1
    return counts
