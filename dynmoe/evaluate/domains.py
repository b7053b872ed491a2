"""The validation loss of each corpus."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from dynmoe.config.constants import IGNORED
from dynmoe.data.batches import Batch, PretrainingData
from dynmoe.data.corpus import Corpus
from dynmoe.evaluate.models import ScoredModel
from dynmoe.evaluate.scoring import ExpertUse, Passage, Progress, rows_of_pass, score
from dynmoe.train.metrics import perplexity
from dynmoe.train.scores import Scores


def score_domains(
    model: ScoredModel,
    corpora: Mapping[str, Corpus],
    cache: Path,
    progress: Progress,
    sequences: Mapping[str, int] | None = None,
) -> dict[str, Scores]:
    """Computes each corpus's mean loss in nats per token, perplexity and experts per token on validation sequences.

    Args:
        corpora: corpora by domain, encoded with the model's tokenizer.
        cache: directory of index files, shared by all ranks.
        progress: called after each forward pass.
        sequences: maximum number of sequences per domain; None: as ``eval.batches`` specifies.
    """
    config = model.config
    scores = {}
    wanted = sequences or dict.fromkeys(corpora, config.eval.batches * config.train.global_batch)
    for name, corpus in corpora.items():
        data = PretrainingData([corpus], config.data, config.train.seed, cache)
        samples = min(wanted[name], data.validation_samples)
        rows = rows_of_pass(model, config.data.sequence_length)
        use = ExpertUse()
        total = 0.0
        scored = 0
        for done, passages in _parts(data, name, samples, rows * model.data_size):
            total -= sum(own.log_prob for own in score(model, passages, use, lambda done, of: None))
            scored += sum(passage.scored for passage in passages)
            progress(min(done, samples), samples)
        loss = total / scored
        scores[name] = {"loss": loss, "perplexity": perplexity(loss)} | use.figures([name])
    return scores


def _parts(data: PretrainingData, name: str, samples: int, size: int) -> Iterator[tuple[int, Sequence[Passage]]]:
    """Yields the sequences, ``size`` at a time, each with the number of sequences done after it."""
    for start in range(0, samples, size):
        batch = data.validation_batch(range(start, min(start + size, samples)))
        yield start + size, [*_passages(batch, name)]


def _passages(batch: Batch, name: str) -> Iterator[Passage]:
    """Yields the sequences of a batch, or their documents, if these do not see each other."""
    length = batch.tokens_BS.shape[1]
    for row, (tokens, labels) in enumerate(zip(batch.tokens_BS.tolist(), batch.labels_BS.tolist(), strict=True)):
        starts = [0] if batch.start_BS is None else batch.start_BS[row].unique().tolist()
        for start, end in pairwise([*starts, length]):
            yield from _passages_of(tokens[start:end], labels[start:end], name)


def _passages_of(tokens: list[int], labels: list[int], name: str) -> Iterator[Passage]:
    """Yields the tokens as passages that score each label once.

    A packed document that sees those before it may begin with another token than the last label. Its sequence is
    therefore scored in several passages: each ends with such a label, and scores only what the one before did not.
    """
    scored = 0
    for place, label in enumerate(labels):
        if label == IGNORED:
            continue
        scored += 1
        following = place + 1
        if following == len(labels) or labels[following] == IGNORED or tokens[following] != label:
            yield Passage([*tokens[:following], label], scored, name)
            scored = 0
