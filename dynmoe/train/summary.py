"""Messages at the start and the end of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from dynmoe.config import Config
from dynmoe.data.corpus import Corpus, by_domain
from dynmoe.data.tokenizer import Tokenizer
from dynmoe.data.validation import training_shares, validation_shares
from dynmoe.model.sampling import sample, whole_context
from dynmoe.model.size import ModelSize
from dynmoe.ops import configured_backend
from dynmoe.train.engine import Engine
from dynmoe.train.metrics import Row
from dynmoe.train.run_directory import RunDirectory
from dynmoe.train.trainer import Result


def validation_unigram_entropy(corpora: list[Corpus], shares: Mapping[str, float]) -> float:
    """Unigram entropy of the validation text in nats per token, weighted over domains by ``shares``."""
    splits = {name: corpus.manifest["splits"]["validation"] for name, corpus in by_domain(corpora).items()}
    return sum(share * splits[name]["unigram_entropy_nats"] for name, share in shares.items())


def write_sample(engine: Engine, tokenizer: Tokenizer, sequence_length: int, num_tokens: int) -> str:
    """A text of at most ``num_tokens`` sampled from the model, as the start of a document. Collective."""
    if not num_tokens:
        return ""
    prompt = [tokenizer.eod, *tokenizer.encode("def ")]
    next_logits = whole_context(engine.logits, sequence_length)
    drawn = sample(next_logits, torch.tensor([prompt]), num_tokens, vocab_size=tokenizer.vocab_size)
    tokens = [int(token_B) for token_B in drawn]
    if tokenizer.eod in tokens:
        tokens = tokens[: tokens.index(tokenizer.eod)]
    return tokenizer.decode(prompt[1:] + tokens)


def describe_start(config: Config, device: torch.device) -> str:
    """A line with precision, device and MoE backend, the first things to check if a run is slow.

    Also says if masked documents change each other's experts.

    Raises:
        ConfigError: the backend does not run on the device.
    """
    if not config.model.moe_layers:
        return f"Training a dense model in {config.train.precision} on {device}."
    backend = configured_backend(config, device)
    line = f"Training in {config.train.precision} on {device}; experts are computed by the {backend.name} backend."
    router = config.model.router
    if router.selects_among != "token" and config.data.documents != "joined":
        among = {"sequence": "a sequence", "batch": "a batch"}[router.selects_among]
        line += f" The {router.kind} router selects among the tokens of {among}, whatever their documents."
    return line


def conclude(
    config: Config, engine: Engine, size: ModelSize, result: Result, corpora: list[Corpus], directory: RunDirectory
) -> None:
    """Prints the final message of a start and writes the outcome of a finished run, on rank 0. Collective."""
    first = engine.rank == 0
    if result.status == "preempted":
        if first:
            print(f"Stop requested: checkpoint saved at step {result.progress.step}; the same command resumes the run.")
        return
    text = write_sample(engine, corpora[0].tokenizer, config.data.sequence_length, config.eval.sample_tokens)
    if first:
        directory.write_outcome("finished", result.progress.step, **facts(result))
        print(describe(config, size, result, corpora, text))


def describe(config: Config, size: ModelSize, result: Result, corpora: list[Corpus], text: str) -> str:
    """A summary: model, experts per token, validation loss, a sample, run directory."""
    row = result.last_row
    progress = result.progress
    lines = [
        f"Trained a {config.model.layers}-layer decoder with {size.total_parameters / 1e6:.1f} M parameters on "
        f"{progress.tokens / 1e6:.2f} M tokens in {progress.step} steps ({_layout(config)})."
    ]
    if config.model.moe_layers:
        per_layer = {
            layer: progress.routed_rows.get(str(layer), 0) / progress.tokens for layer in config.model.moe_layers
        }
        mean = sum(per_layer.values()) / len(per_layer)
        lines.append(
            f"Active parameters per token: {size.active_parameters(mean) / 1e6:.1f} M. The {config.model.router.kind} "
            f"router used {mean:.2f} of {config.model.moe_size} experts per token and MoE layer on average."
        )
        if f"moe/layer_{config.model.moe_layers[0]:02d}/experts_per_token_mean" in row:
            at_end = (f"layer {i}: {row[f'moe/layer_{i:02d}/experts_per_token_mean']:.2f}" for i in per_layer)
            lines.append(f"Experts per token at the end: {', '.join(at_end)}.")
    if "eval/loss" in row:
        lines.append(_validation(config, row, corpora))
    if text:
        lines += ["Sample of generated text:", *(f"    {line}" for line in text.splitlines())]
    lines.append(f"Run directory: {config.run.path}")
    return "\n".join(lines)


def _validation(config: Config, row: Row, corpora: list[Corpus]) -> str:
    """The validation loss, compared with the unigram entropy."""
    if "eval/loss_by_tokens" in row:
        shares = training_shares(corpora, config.data.weights)
        weighting = ", corpora weighted as in training"
        others = f"; {row['eval/loss_by_tokens']:.3f} weighted by their validation tokens"
    else:
        shares = validation_shares(corpora)
        weighting = ""
        others = ""
    loss = row["eval/loss"]
    entropy = validation_unigram_entropy(corpora, shares)
    gain = entropy - loss
    verdict = "better" if gain > 0 else "worse"
    return (
        f"Validation loss {loss:.3f} nats per token{weighting} (perplexity {math.exp(loss):.1f}{others}); "
        f"token frequencies alone would give {entropy:.3f}: {abs(gain):.3f} nats {verdict}."
    )


def _layout(config: Config) -> str:
    """The engine and its parallel sizes."""
    sizes = {name: getattr(config.parallel, name) for name in ("tensor", "pipeline", "context", "expert")}
    return ", ".join([config.engine, *(f"{name}-parallel over {size}" for name, size in sizes.items() if size > 1)])


def facts(result: Result) -> dict[str, Any]:
    """The metrics in outcome.json."""
    names = (
        "eval/loss", "eval/perplexity", "eval/loss_by_tokens", "train/lm_loss", "moe/experts_per_token_mean",
        "train/cumulative_flops",
    )  # fmt: skip
    return {name: result.last_row[name] for name in names if name in result.last_row}
