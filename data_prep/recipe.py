"""The options that determine the bytes of a corpus, and the nodes that prepare it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from data_prep.tiktoken_files import read_tokenizer
from dynmoe.data.tokenizer import Tokenizer
from dynmoe.errors import UserError

_OF_TOKENIZER = ("end_of_text", "special_tokens", "tiktoken_pattern")


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
    end_of_text: str | None = None
    special_tokens: bool | None = None
    tiktoken_pattern: str | None = None

    def __post_init__(self) -> None:
        if not 0.0 < self.validation_fraction < 1.0:
            raise UserError(f"--validation-fraction {self.validation_fraction}: use a number between 0 and 1")
        if self.vocab_size < 300:
            raise UserError(f"--vocab-size {self.vocab_size}: use at least 300 (256 bytes and some pieces)")
        if self.tokenizer_mb < 1:
            raise UserError(f"--tokenizer-mb {self.tokenizer_mb}: use at least 1")
        if self.tokenizer is None:
            for name in _OF_TOKENIZER:
                if getattr(self, name) is not None:
                    raise UserError(f"--{name.replace('_', '-')}: applies to a given tokenizer; pass --tokenizer too")

    @cached_property
    def given(self) -> Tokenizer | None:
        """The existing tokenizer to use; None: train one.

        Raises:
            UserError: it cannot be used.
        """
        if self.tokenizer is None:
            return None
        return read_tokenizer(self.tokenizer, self.end_of_text, self.special_tokens, self.tiktoken_pattern)


def recipe_digest(recipe: Recipe) -> str:
    """SHA-256 of the options; an existing tokenizer is hashed by content."""
    facts = dataclasses.asdict(recipe) | {"sources": [Path(source).name for source in recipe.sources]}
    if recipe.read_as is None:
        del facts["read_as"]  # keeps corpora current that were made before this option existed
    for name in _OF_TOKENIZER:
        del facts[name]  # part of the tokenizer
    if recipe.given is not None:
        facts["tokenizer"] = recipe.given.sha256
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
