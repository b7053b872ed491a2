"""The options that determine the bytes of a corpus, and the nodes that prepare it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from dynmoe.data.tokenizer import Tokenizer
from dynmoe.errors import UserError


@dataclass(frozen=True)
class Recipe:
    """All options that determine the bytes of a corpus, apart from the text."""

    sources: list[str]
    json_key: str = "text"
    vocab_size: int = 4096
    tokenizer: str | None = None
    tokenizer_mb: int = 16
    validation_fraction: float = 0.02
    deduplicate: bool = True
    read_as: str | None = None

    def __post_init__(self) -> None:
        if not 0.0 < self.validation_fraction < 1.0:
            raise UserError(f"--validation-fraction {self.validation_fraction}: use a number between 0 and 1")
        if self.vocab_size < 300:
            raise UserError(f"--vocab-size {self.vocab_size}: use at least 300 (256 bytes and some pieces)")
        if self.tokenizer_mb < 1:
            raise UserError(f"--tokenizer-mb {self.tokenizer_mb}: use at least 1")


def recipe_digest(recipe: Recipe) -> str:
    """SHA-256 of the options; an existing tokenizer is hashed by content."""
    facts = dataclasses.asdict(recipe) | {"sources": [Path(source).name for source in recipe.sources]}
    if recipe.read_as is None:
        del facts["read_as"]  # keeps corpora current that were made before this option existed
    if recipe.tokenizer is not None:
        facts["tokenizer"] = Tokenizer(recipe.tokenizer).sha256
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Nodes:
    """The position of this node among those that prepare a corpus together, over one file system.

    Attributes:
        own: index of this node; node 0 trains the tokenizer and merges the parts.
    """

    count: int = 1
    own: int = 0

    def __post_init__(self) -> None:
        if self.count < 1 or not 0 <= self.own < self.count:
            raise UserError(f"--node {self.own}: with --nodes {self.count}, use 0 to {max(self.count, 1) - 1}")
