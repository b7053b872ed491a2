"""What an evaluation reads of each corpus of a run, and what their losses weigh."""

from __future__ import annotations

from collections.abc import Sequence

from dynmoe.config import Config
from dynmoe.data.corpus import Corpus, by_domain, source_names
from dynmoe.errors import ConfigError


def training_shares(corpora: Sequence[Corpus], weights: Sequence[float]) -> dict[str, float]:
    """What training takes of each domain, in sum 1: its ``weights``, or the training tokens where there are none."""
    return _shares(corpora, weights or [corpus.splits["train"].num_tokens for corpus in corpora])


def validation_shares(corpora: Sequence[Corpus]) -> dict[str, float]:
    """What each domain has of all validation tokens, in sum 1."""
    return _shares(corpora, [corpus.splits["validation"].num_tokens for corpus in corpora])


def _shares(corpora: Sequence[Corpus], weights: Sequence[float]) -> dict[str, float]:
    """Weights by domain; those of a corpus that a blend names twice are added."""
    names, shares = source_names([str(corpus.path) for corpus in corpora]), dict[str, float]()
    for corpus, weight in zip(corpora, weights, strict=True):
        name = names[str(corpus.path)]
        shares[name] = shares.get(name, 0.0) + weight / sum(weights)
    return shares


def is_weighted(config: Config, corpora: Sequence[Corpus]) -> bool:
    """Whether the validation loss of a run on these ``corpora`` is measured by domain and weighted as training."""
    return config.eval.weighting == "blend" and len(by_domain(corpora)) > 1


def sequences_by_domain(config: Config, corpora: Sequence[Corpus], data_size: int = 1) -> dict[str, int]:
    """How many validation sequences of each domain an evaluation reads that is weighted as training.

    ``eval.batches`` global batches, or as many as there are, are split as training splits its own. Each domain has
    whole micro-batches, and one at least; together they fill whole passes.

    Args:
        config: of the run.
        corpora: of ``data.dirs``.
        data_size: ranks that read different sequences.

    Raises:
        ConfigError: a domain, or the evaluation, is too small for that.
    """
    rows, length = config.train.micro_batch, config.data.sequence_length
    limits = {name: corpus.sequences("validation", length) // rows for name, corpus in by_domain(corpora).items()}
    for name, limit in limits.items():
        if limit == 0:
            problem = f"the validation data of {name} does not fill one micro-batch"
            cure = "use a smaller one, more text, or eval.weighting=tokens"
            raise ConfigError("train.micro_batch", rows, problem, cure)
    wanted = config.eval.batches * config.train.global_batch // rows
    total = min(wanted, sum(limits.values())) // data_size * data_size
    if total < len(limits):
        problem = f"an evaluation has {total} micro-batches, fewer than there are corpora ({len(limits)})"
        cure = "use more, a smaller train.micro_batch, more text, or eval.weighting=tokens"
        raise ConfigError("eval.batches", config.eval.batches, problem, cure)
    counts = apportion(total, training_shares(corpora, config.data.weights), limits)
    return {name: count * rows for name, count in counts.items()}


def apportion(total: int, shares: dict[str, float], limits: dict[str, int]) -> dict[str, int]:
    """Splits ``total`` in proportion to ``shares``, by the method of Sainte-Laguë: at least 1 each, at most its limit.

    ``total`` is at least the number of shares and at most the sum of the limits.
    """
    counts = dict.fromkeys(shares, 1)
    for _ in range(total - len(counts)):
        open_names = [name for name in counts if counts[name] < limits[name]]
        counts[max(open_names, key=lambda name: shares[name] / (2 * counts[name] + 1))] += 1
    return counts
