"""Files and fields of an imported checkpoint that the run keeps and its export includes again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dynmoe.data.sentencepiece_tokenizer import TOKENIZER_MODEL
from dynmoe.data.tokenizer import Tokenizer
from dynmoe.data.tokenizer_files import find_tokenizer
from dynmoe.hf.fields import KEPT
from dynmoe.train.checkpoint import IMPORTED

_CONFIG = "config.json"
_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template*",
    "additional_chat_templates/*", "generation_config.json",
)  # fmt: skip


def to_keep(source: Path, config: Mapping[str, Any], tokenizer: Tokenizer | None) -> dict[str, bytes]:
    """Files of the checkpoint in ``source`` that a run keeps, by their path in the run directory.

    Args:
        source: directory of the checkpoint.
        config: its ``config.json``, with the family's defaults for the fields of ``KEPT``.
        tokenizer: its tokenizer, which becomes the run's; None if it has none.
    """
    files = {f"{IMPORTED}/{_CONFIG}": json.dumps(config, indent=2).encode()}
    for path in (path for pattern in _FILES for path in sorted(source.glob(pattern)) if path.is_file()):
        files[f"{IMPORTED}/{path.relative_to(source).as_posix()}"] = path.read_bytes()
    return files if tokenizer is None else files | tokenizer.files


@dataclass(frozen=True)
class Kept:
    """What a run keeps of its imported checkpoint; empty if it was not imported.

    Attributes:
        fields: the fields of ``KEPT``.
        files: ``config.json``, tokenizer and generation settings, by name.
    """

    fields: dict[str, Any] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)

    @classmethod
    def of(cls, run: Path) -> Kept:
        """Reads a run directory; skips the imported tokenizer if the run was trained with another one."""
        folder = run / IMPORTED
        if not folder.exists():
            return cls()
        config = json.loads((folder / _CONFIG).read_text())
        fields = {name: config[name] for name in KEPT if name in config}
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        trained = find_tokenizer(run)
        # Runs of earlier versions have no tokenizer.json of their own.
        imported = files.get(TOKENIZER_MODEL if trained is None else trained.name)
        if imported != (None if trained is None else trained.read_bytes()):
            return cls({name: value for name, value in fields.items() if not name.endswith("_token_id")})
        return cls(fields, files)

    def write(self, directory: Path) -> None:
        """Writes the files into a directory."""
        for name, content in self.files.items():
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_bytes(content)

    @property
    def has_tokenizer(self) -> bool:
        """Whether the files contain a tokenizer for transformers; a sentencepiece model alone is not enough."""
        return "tokenizer.json" in self.files or "tokenizer_config.json" in self.files
