"""Makes a corpus from existing .bin/.idx files, such as those of Megatron-LM's preprocess_data.py."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from data_prep.build import figures
from data_prep.merge import SplitCounts
from dynmoe.data.corpus import FORMAT, MANIFEST, SPLITS, Corpus, describe_files
from dynmoe.data.indexed import IndexedTokens, check_indexed, with_ending, write_index
from dynmoe.data.tokenizer import Tokenizer
from dynmoe.errors import UserError

_COPIED_AT_A_TIME = 1 << 24


def adopt(train: Path, validation: Path | None, fraction: float, tokenizer: Tokenizer, out: Path) -> dict[str, Any]:
    """Writes a corpus into ``out`` and returns its manifest. Copies the tokens byte for byte.

    Args:
        train: prefix of the .bin and .idx files with the training data.
        validation: prefix of the validation data; None: use the last documents of ``train``.
        fraction: in that case, the share of the documents for validation.
        tokenizer: the tokenizer that encoded the tokens.
        out: a directory that does not exist.

    Raises:
        UserError: files are damaged, or tokens are outside the vocabulary.
    """
    building = out.with_name(f"{out.name}.adopting-{os.getpid()}")
    building.mkdir(parents=True)
    try:
        given = check_indexed(train)
        if validation is not None:
            for split, source in (("train", given), ("validation", check_indexed(validation))):
                for suffix in (".bin", ".idx"):
                    _link(with_ending(source.prefix, suffix), building / f"{split}{suffix}")
        else:
            _split(given, given.num_documents - max(1, round(given.num_documents * fraction)), building)
        for name, content in tokenizer.files.items():
            (building / name).write_bytes(content)
        splits = {split: check_indexed(building / split) for split in SPLITS}
        for split, tokens in splits.items():
            if tokens.num_tokens == 0:
                raise UserError(f"{train}: gives no {split} document; use more text or another fraction")
        described = describe_files(building)
        manifest = {
            "format": FORMAT,
            "recipe": "adopted",
            "input": hashlib.sha256(json.dumps(described["files"]).encode()).hexdigest(),
            "sources": [prefix.name for prefix in (train, validation) if prefix is not None],
            "tokenizer": {"sha256": tokenizer.sha256, "vocab_size": tokenizer.vocab_size, "eod": tokenizer.eod},
            "splits": {
                split: dataclasses.asdict(SplitCounts(tokens.num_documents, tokens.num_tokens))
                | figures(tokens.counts(tokenizer.vocab_size), tokenizer)
                for split, tokens in splits.items()
            },
            "refused": {"counts": {}, "first_names": {}},
            **described,
        }
        (building / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
        Corpus.open(building)
        building.rename(out)
    except BaseException:
        shutil.rmtree(building)
        raise
    return manifest


def _link(source: Path, target: Path) -> None:
    """Hard-links a file if the file system can, else copies it."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def _split(tokens: IndexedTokens, first: int, directory: Path) -> None:
    """Writes the documents before ``first`` as training data and the others as validation data."""
    cut = int(tokens.boundaries[first])
    ends = {"train": (0, cut, 0, first), "validation": (cut, len(tokens.lengths), first, tokens.num_documents)}
    with with_ending(tokens.prefix, ".bin").open("rb") as stream:
        for split, (start, stop, first_document, last_document) in ends.items():
            lengths = tokens.lengths[start:stop]
            write_index(
                directory / split, tokens.dtype, lengths, tokens.boundaries[first_document : last_document + 1] - start
            )
            left = int(lengths.sum(dtype="int64")) * tokens.dtype.itemsize
            with (directory / f"{split}.bin").open("wb") as written:
                while left:
                    block = stream.read(min(left, _COPIED_AT_A_TIME))
                    written.write(block)
                    left -= len(block)
