"""Builds a prepared corpus in one go: tokenizer, tokens, manifest."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from rich.console import Console
from rich.progress import Progress

from data_prep.encode import encode_in_order, tasks
from data_prep.sources import RawDocument, RefusedError, read_documents, text_of
from dynmoe.data.corpus import FORMAT, MANIFEST, SPLITS, TOKENIZER, Corpus, sha256_of
from dynmoe.data.indexed import check_indexed
from dynmoe.data.tokenizer import Tokenizer
from dynmoe.errors import UserError

_NAMES_PER_REASON = 20


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the bytes of a corpus, besides the text itself."""

    sources: list[str]
    json_key: str = "text"
    vocab_size: int = 4096
    tokenizer: str | None = None
    tokenizer_mb: int = 16
    validation_fraction: float = 0.02

    def __post_init__(self) -> None:
        if not 0.0 < self.validation_fraction < 1.0:
            raise UserError(f"--validation-fraction {self.validation_fraction}: use a number between 0 and 1")
        if self.vocab_size < 300:
            raise UserError(f"--vocab-size {self.vocab_size}: use at least 300 (256 bytes and some pieces)")


@dataclass
class SplitCounts:
    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0


@dataclass
class Refusals:
    """Documents without text, counted by reason, the first of each by name."""

    counts: dict[str, int] = field(default_factory=dict)
    names: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, name: str) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + 1
        names = self.names.setdefault(reason, [])
        if len(names) < _NAMES_PER_REASON:
            names.append(name)


def train_tokenizer(recipe: Recipe) -> bytes:
    """A BPE model with byte fallback; the bytes of a .model file.

    It gives every text back unchanged, but for U+2581, the character that stands for a space in its pieces.

    Raises:
        UserError: too little text for the vocabulary.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(recipe),
            model_writer=model,
            model_type="bpe",
            vocab_size=recipe.vocab_size,
            byte_fallback=True,
            character_coverage=0.9999,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            num_threads=1,  # the order of threads must not decide the vocabulary
            minloglevel=2,
        )
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(f"--vocab-size {recipe.vocab_size}: no tokenizer ({reason}); use less or more text") from None
    return model.getvalue()


def _lines(recipe: Recipe) -> Iterator[str]:
    budget = recipe.tokenizer_mb * 1_000_000
    for document in read_documents(recipe.sources, recipe.json_key):
        try:
            text = text_of(document)
        except RefusedError:
            continue
        yield from (line for line in text.split("\n") if line)
        budget -= len(document.content)
        if budget <= 0:
            return


def _encode_all(recipe: Recipe, directory: Path, workers: int) -> tuple[dict[str, SplitCounts], Refusals, str]:
    # They take seconds to import: not for a refusal, nor for a corpus that is up to date.
    import torch

    from dynmoe.data.megatron import DType, IndexedDatasetBuilder

    tokenizer = Tokenizer(directory / TOKENIZER)
    dtype = DType.optimal_dtype(tokenizer.vocab_size)
    builders = {split: IndexedDatasetBuilder(str(directory / f"{split}.bin"), dtype) for split in SPLITS}
    counts, refusals = {split: SplitCounts() for split in SPLITS}, Refusals()
    fingerprint = _Fingerprint()
    documents = fingerprint.watch(read_documents(recipe.sources, recipe.json_key))
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("documents", total=None)
        for group in encode_in_order(tasks(documents, recipe.validation_fraction), directory / TOKENIZER, workers):
            for document in group:
                if document.refused is not None or document.tokens is None:
                    refusals.add(str(document.refused), document.name)
                    continue
                builders[document.split].add_item(torch.from_numpy(document.tokens))
                builders[document.split].end_document()
                count = counts[document.split]
                count.documents += 1
                count.tokens += len(document.tokens)
                count.text_bytes += document.text_bytes
            done = sum(count.text_bytes for count in counts.values())
            progress.update(bar, advance=len(group), description=f"{done / 1e6:.1f} MB of text")
    for split, builder in builders.items():
        if counts[split].documents == 0:
            raise UserError(f"no {split} document came out of {recipe.sources}; give more text or another fraction")
        builder.finalize(str(directory / f"{split}.idx"))
    return counts, refusals, fingerprint.digest()


class _Fingerprint:
    """SHA-256 over names and contents of all raw documents."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def watch(self, documents: Iterable[RawDocument]) -> Iterator[RawDocument]:
        for document in documents:
            self._hash.update(f"{document.name}\0{len(document.content)}\0".encode())
            self._hash.update(document.content)
            yield document

    def digest(self) -> str:
        return self._hash.hexdigest()


def unigram_entropy(counts: np.ndarray) -> float:
    """Entropy of the token frequencies in nats: the loss of the best model that knows nothing but frequencies."""
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())


def build(recipe: Recipe, out: Path, workers: int) -> dict[str, Any]:
    """Writes the corpus into ``out`` and returns its manifest.

    Everything is written beside it and renamed when complete: an interrupted build leaves what was there before.

    Raises:
        UserError: unusable text or options.
    """
    building = out.with_name(f"{out.name}.building-{os.getpid()}")
    building.mkdir(parents=True)
    try:
        if recipe.tokenizer is None:
            (building / TOKENIZER).write_bytes(train_tokenizer(recipe))
        else:
            Tokenizer(recipe.tokenizer)
            shutil.copyfile(recipe.tokenizer, building / TOKENIZER)
        counts, refusals, fingerprint = _encode_all(recipe, building, workers)
        manifest = _manifest(recipe, building, counts, refusals, fingerprint)
        (building / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
        Corpus.open(building)
        if out.exists():
            shutil.rmtree(out)
        building.rename(out)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return manifest


def _manifest(
    recipe: Recipe, directory: Path, counts: dict[str, SplitCounts], refusals: Refusals, fingerprint: str
) -> dict[str, Any]:
    tokenizer = Tokenizer(directory / TOKENIZER)
    files = [TOKENIZER, *(f"{split}.{suffix}" for split in SPLITS for suffix in ("bin", "idx"))]
    return {
        "format": FORMAT,
        "recipe": recipe_digest(recipe),
        "input": fingerprint,
        "sources": [Path(source).name for source in recipe.sources],
        "tokenizer": {"sha256": tokenizer.sha256, "vocab_size": tokenizer.vocab_size, "eod": tokenizer.eod},
        "splits": {
            split: dataclasses.asdict(counts[split]) | _figures(directory, split, tokenizer) for split in SPLITS
        },
        "refused": {"counts": refusals.counts, "first_names": refusals.names},
        "files": {name: {"bytes": (directory / name).stat().st_size, "sha256": sha256_of(directory / name)}
                  for name in files},
    }  # fmt: skip


def _figures(directory: Path, split: str, tokenizer: Tokenizer) -> dict[str, float]:
    entropy = unigram_entropy(check_indexed(directory / split).counts(tokenizer.vocab_size))
    return {"unigram_entropy_nats": round(entropy, 6), "unigram_perplexity": round(math.exp(entropy), 3)}


def recipe_digest(recipe: Recipe) -> str:
    """SHA-256 of the options; an existing tokenizer counts by its content."""
    facts = dataclasses.asdict(recipe) | {"sources": [Path(source).name for source in recipe.sources]}
    if recipe.tokenizer is not None:
        facts["tokenizer"] = Tokenizer(recipe.tokenizer).sha256
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def is_current(recipe: Recipe, out: Path) -> bool:
    """Whether ``out`` is an undamaged corpus made from this recipe and this text.

    Raises:
        UserError: ``out`` is a corpus, but a damaged one.
    """
    corpus = Corpus.open(out)
    if corpus.manifest.get("recipe") != recipe_digest(recipe):
        return False
    fingerprint = _Fingerprint()
    for _ in fingerprint.watch(read_documents(recipe.sources, recipe.json_key)):
        pass
    if corpus.manifest.get("input") != fingerprint.digest():
        return False
    corpus.verify()
    return True
