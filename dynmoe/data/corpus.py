"""A prepared corpus: a directory with a manifest, a tokenizer, and .bin/.idx pairs for training and validation."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dynmoe.data import PREPARE_AGAIN
from dynmoe.data.huggingface_tokenizer import TOKENIZER_CONFIG, TOKENIZER_JSON
from dynmoe.data.indexed import IndexedTokens, check_indexed
from dynmoe.data.pieces import BLOCK_BYTES, Piece, TokenIds, UnreadableError, first_problem, hash_blocks
from dynmoe.data.sentencepiece_tokenizer import TOKENIZER_MODEL
from dynmoe.data.tokenizer import Tokenizer
from dynmoe.data.tokenizer_files import TOKENIZER_FILES, open_tokenizer
from dynmoe.errors import UserError

MANIFEST = "manifest.json"
SPLITS = ("train", "validation")
TOKEN_FILES = tuple(f"{split}.{ending}" for split in SPLITS for ending in ("bin", "idx"))
_TOKENIZERS = tuple(map(frozenset, ((TOKENIZER_MODEL,), (TOKENIZER_JSON, TOKENIZER_CONFIG))))
FORMAT = 1
_CHECKED_ENDS = 100
_KEYS = {"files", "input", "recipe", "refused", "sources", "splits", "tokenizer"}


def sha256_of(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def describe_files(directory: Path, block_bytes: int = BLOCK_BYTES) -> dict[str, Any]:
    """Returns a manifest's entries: size and SHA-256 of each file, and the SHA-256 of each block of large files.

    Block hashes are separate from the file entries, so that fingerprints still match those of older manifests.
    """
    files = {}
    blocks = {}
    for name in (*TOKENIZER_FILES, *TOKEN_FILES):
        path = directory / name
        if name in TOKENIZER_FILES and not path.exists():
            continue
        sha256, hashes = hash_blocks(path, block_bytes)
        files[name] = {"bytes": path.stat().st_size, "sha256": sha256}
        if len(hashes) > 1:
            blocks[name] = hashes
    return {"files": files} | ({"blocks": {"bytes": block_bytes, "sha256": blocks}} if blocks else {})


@dataclass(frozen=True)
class Corpus:
    """A corpus whose structure was checked (see :func:`check_indexed`).

    Attributes:
        tokenizer: the tokenizer that encoded the corpus.
        splits: tokens of ``train`` and ``validation``.
    """

    path: Path
    manifest: dict[str, Any]
    tokenizer: Tokenizer
    splits: dict[str, IndexedTokens]

    @classmethod
    def open(cls, path: str | Path) -> Corpus:
        """Reads a corpus and checks its structure, sizes and tokenizer; :meth:`verify` checks hashes and token ids.

        Raises:
            UserError: a file is missing or damaged.
        """
        path = Path(path)
        try:
            manifest = json.loads((path / MANIFEST).read_text())
        except FileNotFoundError:
            cure = f"prepare one with python -m data_prep --out {path}"
            raise UserError(f"data.dirs: {path} holds no prepared corpus ({MANIFEST} is missing); {cure}") from None
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{path / MANIFEST} cannot be read: {error}; {PREPARE_AGAIN}") from None
        if not _is_manifest(manifest):
            raise UserError(f"{path / MANIFEST} is not a manifest of format {FORMAT}; {PREPARE_AGAIN}")
        main_file = next(name for name in (TOKENIZER_MODEL, TOKENIZER_JSON) if name in manifest["files"])
        tokenizer = open_tokenizer(path / main_file)
        if tokenizer.sha256 != manifest["tokenizer"]["sha256"]:
            raise UserError(f"{path / main_file} is not the tokenizer of the manifest; {PREPARE_AGAIN}")
        splits = {split: check_indexed(path / split) for split in SPLITS}
        for name, facts in manifest["files"].items():
            if not (path / name).is_file():
                raise UserError(f"{path / name} is missing; {PREPARE_AGAIN}")
            if (path / name).stat().st_size != facts["bytes"]:
                raise UserError(f"{path / name}: its size differs from the manifest; {PREPARE_AGAIN}")
        for split, tokens in splits.items():
            if manifest["splits"][split]["tokens"] != tokens.num_tokens:
                raise UserError(f"{path / split}.idx: its token count differs from the manifest; {PREPARE_AGAIN}")
        return cls(path, manifest, tokenizer, splits)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over all files of the corpus."""
        return hashlib.sha256(json.dumps(self.manifest["files"], sort_keys=True).encode()).hexdigest()

    def sequences(self, split: str, length: int) -> int:
        """Number of sequences of ``length`` tokens in a split, each followed by one more token to predict."""
        return (self.splits[split].num_tokens - 1) // length

    @cached_property
    def split_without_ends(self) -> str | None:
        """A split whose documents do not end with the end-of-text token; None if both do.

        Looks at up to a hundred documents, once, as a tool adds the token to all or to none.
        """
        for split, tokens in self.splits.items():
            if any(token != self.tokenizer.eod for token in tokens.last_tokens(_CHECKED_ENDS)):
                return split
        return None

    def check_ends(self) -> None:
        """Checks that documents end with the end-of-text token.

        Raises:
            UserError: those of a split do not.
        """
        if self.split_without_ends is not None:
            problem = f"the documents of {self.path / self.split_without_ends} do not end with the end-of-text token"
            cure = "use data.documents=joined, or add it (--append-eod of Megatron-LM's own tool)"
            raise UserError(f"data.documents=masked: {problem}; {cure}")

    def pieces(self) -> list[Piece]:
        """Splits the corpus into pieces that can be checked independently: blocks, or whole files if it is older."""
        blocks = self.manifest.get("blocks", {"bytes": 0, "sha256": {}})
        pieces = []
        for name, facts in sorted(self.manifest["files"].items()):
            split, ending = name.split(".")
            ids = TokenIds(self.splits[split].dtype, self.tokenizer.vocab_size) if ending == "bin" else None
            path = self.path / name
            size = facts["bytes"]
            if name not in blocks["sha256"]:
                pieces.append(Piece(path, str(path), 0, size, size, facts["sha256"], ids))
                continue
            for number, sha256 in enumerate(blocks["sha256"][name]):
                start = number * blocks["bytes"]
                pieces.append(Piece(path, str(path), start, min(blocks["bytes"], size - start), size, sha256, ids))
        return pieces

    def verify(self) -> None:
        """Checks every hash and every token id in this process.

        Raises:
            UserError: a file differs from the manifest, or cannot be read.
        """
        try:
            problem = first_problem(self.pieces())
        except UnreadableError as error:
            raise UserError(f"{error}; make it readable") from None
        if problem:
            raise UserError(f"{problem}; {PREPARE_AGAIN}")


def _is_manifest(manifest: Any) -> bool:
    """Whether a manifest has all fields that are read, now or at the end of a training run."""
    try:
        return (
            manifest["format"] == FORMAT
            and not _KEYS - manifest.keys()
            and manifest["files"].keys() >= set(TOKEN_FILES)
            and manifest["files"].keys() - set(TOKEN_FILES) in _TOKENIZERS
            and all({"bytes", "sha256"} <= facts.keys() for facts in manifest["files"].values())
            and isinstance(manifest["tokenizer"]["sha256"], str)
            and all(math.isfinite(manifest["splits"][split]["unigram_entropy_nats"]) for split in SPLITS)
            and all("tokens" in manifest["splits"][split] for split in SPLITS)
            and _are_blocks(manifest.get("blocks"), manifest["files"])
        )
    except (AttributeError, LookupError, TypeError, OverflowError):
        return False


def _are_blocks(blocks: Any, files: dict[str, Any]) -> bool:
    """Whether block hashes cover the files that have them; older manifests have none."""
    if blocks is None:
        return True
    size = blocks["bytes"]
    return (
        type(size) is int
        and size > 0
        and size % 8 == 0  # no token crosses a block boundary
        and all(
            len(hashes) == -(-files[name]["bytes"] // size) and all(isinstance(one, str) for one in hashes)
            for name, hashes in blocks["sha256"].items()
        )
    )


def open_corpora(dirs: Sequence[str], sequence_length: int) -> list[Corpus]:
    """Opens the corpora of a blend and checks that they match each other and the sequence length.

    Raises:
        UserError: a corpus is damaged, has a different tokenizer, or is shorter than a sequence.
    """
    corpora = [Corpus.open(path) for path in dirs]
    for corpus in corpora:
        if not corpus.tokenizer.encodes_like(corpora[0].tokenizer):
            cure = f"prepare it with --tokenizer {corpora[0].path / corpora[0].tokenizer.main_file}"
            raise UserError(f"data.dirs: {corpus.path} has a different tokenizer than {corpora[0].path}; {cure}")
        for split, tokens in corpus.splits.items():
            if tokens.num_tokens <= sequence_length:
                raise UserError(
                    f"data.sequence_length={sequence_length}: {corpus.path} has {tokens.num_tokens} {split} tokens, "
                    "not enough for one sequence; use a shorter sequence or more text"
                )
    return corpora


def source_names(paths: Sequence[str]) -> dict[str, str]:
    """Display name of each file or folder: its own name, or its whole path if others share the name."""
    count = Counter(Path(path).name for path in set(paths))
    return {path: Path(path).name if count[Path(path).name] == 1 else path for path in paths}


def by_domain(corpora: Sequence[Corpus]) -> dict[str, Corpus]:
    """Corpora by domain name; a corpus that a blend lists twice is one domain."""
    names = source_names([str(corpus.path) for corpus in corpora])
    return {names[str(corpus.path)]: corpus for corpus in corpora}
