"""The validation loss of each corpus by itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from dynmoe.data.batches import PretrainingData
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
    """Mean loss in nats per token, perplexity and experts per token of each corpus, on its validation sequences.

    Args:
        model: the model.
        corpora: by the name of their domain; with the tokenizer of the model.
        cache: directory of Megatron's index files, shared by all ranks.
        progress: is told of each pass.
        sequences: how many of each are read, as far as there are so many; as ``eval.batches`` says by default.
    """
    config, scores = model.config, {}
    wanted = sequences or dict.fromkeys(corpora, config.eval.batches * config.train.global_batch)
    for name, corpus in corpora.items():
        data = PretrainingData([corpus], [], config.data.sequence_length, config.train.seed, cache)
        samples = min(wanted[name], data.validation_samples)
        rows, use, total = rows_of_pass(model, config.data.sequence_length), ExpertUse(), 0.0
        for done, passages in _parts(data, name, samples, rows * model.data_size):
            total -= sum(own.log_prob for own in score(model, passages, use, lambda done, of: None))
            progress(min(done, samples), samples)
        loss = total / samples / config.data.sequence_length
        scores[name] = {"loss": loss, "perplexity": perplexity(loss)} | use.figures([name])
    return scores


def _parts(data: PretrainingData, name: str, samples: int, size: int) -> Iterator[tuple[int, Sequence[Passage]]]:
    """The sequences, ``size`` at a time, with the number of those that are done then."""
    for start in range(0, samples, size):
        batch = data.validation_batch(range(start, min(start + size, samples)))
        passages = [
            Passage([*tokens, labels[-1]], len(labels), name)
            for tokens, labels in zip(batch.tokens_BS.tolist(), batch.labels_BS.tolist(), strict=True)
        ]
        yield start + size, passages
