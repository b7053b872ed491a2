"""The validation loss of a run: of its blend and of each domain, or of all text together."""

from __future__ import annotations

from dynmoe.config import Config
from dynmoe.data.batches import PretrainingData
from dynmoe.data.corpus import by_domain
from dynmoe.data.validation import is_weighted, sequences_by_domain, training_shares, validation_shares
from dynmoe.errors import ConfigError
from dynmoe.train.engine import Engine
from dynmoe.train.metrics import Row, perplexity
from dynmoe.train.scores import scores_row


class Evaluation:
    """The validation loss over the first ``eval.batches`` global batches of validation sequences, or all if fewer.

    For several corpora with ``eval.weighting=blend``, each micro-batch is of one domain, and ``eval/loss`` weights the
    mean losses of the domains as training does. Otherwise the validation text of all corpora is concatenated. A
    remainder that does not fill a forward pass on every rank is skipped.

    Attributes:
        sequences: number of sequences for the score of a domain, by the domain's name.

    Args:
        config: configuration of the run.
        engine: engine of the evaluated model.
        data: data of the run.

    Raises:
        ConfigError: the validation data is too small; raised before training, not at the first evaluation.
    """

    def __init__(self, config: Config, engine: Engine, data: PretrainingData) -> None:
        self._engine = engine
        corpora = data.corpora
        domains = by_domain(corpora)
        if is_weighted(config, corpora):
            self._shares = training_shares(corpora, config.data.weights)
            self._shares_by_tokens = validation_shares(corpora)
            self.sequences = sequences_by_domain(config, corpora, engine.data_size)
            self._texts = [
                PretrainingData([domains[name]], data.settings, data.seed, data.cache) for name in self.sequences
            ]
            # validation_samples builds an index collectively, so every rank asks every text here.
            counts = [min(n, t.validation_samples) for n, t in zip(self.sequences.values(), self._texts, strict=True)]
        else:
            self._shares = {}
            self._texts = [data]
            self.sequences = dict.fromkeys(domains, config.eval.batches * config.train.global_batch)
            counts = [_sequences_of_all(config, engine, data)]
        rows = config.train.micro_batch
        every = [(text, range(i, i + rows)) for text, count in enumerate(counts) for i in range(0, count, rows)]
        self._own = every[engine.data_rank :: engine.data_size]

    def row(self) -> Row:
        """The loss in nats per token and its perplexity, in a blend also those of each domain. Collective."""
        batches = [self._texts[text].validation_batch(numbers) for text, numbers in self._own]
        losses = self._engine.evaluate(batches, [text for text, _ in self._own], len(self._texts))
        if not self._shares:
            return {"eval/loss": losses[0], "eval/perplexity": perplexity(losses[0])}
        by_domain = dict(zip(self.sequences, losses, strict=True))
        loss = sum(share * by_domain[name] for name, share in self._shares.items())
        return {
            "eval/loss": loss,
            "eval/perplexity": perplexity(loss),
            "eval/loss_by_tokens": sum(share * by_domain[name] for name, share in self._shares_by_tokens.items()),
            **scores_row({}, {name: {"loss": own} for name, own in by_domain.items()}),
        }


def _sequences_of_all(config: Config, engine: Engine, data: PretrainingData) -> int:
    """Number of validation sequences that an evaluation of all text reads; collective."""
    per_pass = config.train.micro_batch * engine.data_size
    if data.validation_samples < per_pass:
        problem = (
            f"the validation data has {data.validation_samples} sequences, "
            f"fewer than one forward pass on all ranks ({per_pass})"
        )
        raise ConfigError("train.micro_batch", config.train.micro_batch, problem, "use a smaller value or more text")
    wanted = min(config.eval.batches * config.train.global_batch, data.validation_samples)
    return wanted // per_pass * per_pass
