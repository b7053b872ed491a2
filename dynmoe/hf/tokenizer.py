"""Conversion of our sentencepiece model to a fast tokenizer of transformers that gives the same ids."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dynmoe.data.tokenizer import Tokenizer
from dynmoe.errors import UserError


def padding(tokenizer: Tokenizer) -> int:
    """Id of the padding piece.

    With byte fallback this is the unknown piece, which is then unused. EOD is the second choice: losses ignore padding,
    but the end of a text has to be learned.
    """
    return tokenizer.unknown if tokenizer.has_bytes else tokenizer.eod


def write_tokenizer(tokenizer: Tokenizer, directory: Path, fields: Mapping[str, Any]) -> None:
    """Writes ``tokenizer.json`` with its configuration, and sentencepiece's own file.

    As in training, ``</s>`` in a text is four characters. Padding is on the left, as generation requires. Two further
    fields state whether a token or a space is prepended to a text, for llama.cpp's converter.

    Args:
        tokenizer: tokenizer of the run.
        directory: directory of the export.
        fields: fields of ``config.json``: ``max_position_embeddings`` and, optionally, ``bos_token_id``.
    """
    from transformers import TokenizersBackend

    begin = tokenizer.eod if fields.get("bos_token_id") is None else fields["bos_token_id"]
    pieces = {"bos_token": begin, "eos_token": tokenizer.eod, "unk_token": tokenizer.unknown}
    special = {name: tokenizer.piece(token) for name, token in (pieces | {"pad_token": padding(tokenizer)}).items()}
    settings = {
        "tokenizer_class": "TokenizersBackend", "model_max_length": fields["max_position_embeddings"],
        "padding_side": "left", "split_special_tokens": True, "clean_up_tokenization_spaces": False, **special,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tokenizer.model").write_bytes(tokenizer.content)
        (Path(folder) / "tokenizer_config.json").write_text(json.dumps(settings))
        fast = TokenizersBackend.from_pretrained(folder)
    fast.save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    before = {"add_bos_token": False, "add_prefix_space": tokenizer.adds_space}
    path.write_text(json.dumps(json.loads(path.read_text()) | before, indent=2, ensure_ascii=False) + "\n")
    (directory / "tokenizer.model").write_bytes(tokenizer.content)


def compare(tokenizer: Tokenizer, directory: Path, texts: Iterable[str], cure: str) -> int:
    """Compares the tokenizer that transformers loads from ``directory`` with sentencepiece.

    Args:
        tokenizer: tokenizer of the run.
        directory: directory of the other tokenizer.
        texts: texts to encode with both, without special tokens.
        cure: the fix for a difference, for the error message.

    Returns:
        The number of texts.

    Raises:
        UserError: the ids of a text differ.
    """
    from transformers import AutoTokenizer

    encode = AutoTokenizer.from_pretrained(directory)
    compared = 0
    for text in texts:
        ours = tokenizer.encode(text)
        theirs = encode(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        if ours != theirs:
            pairs = enumerate(zip([*ours, None], [*theirs, None], strict=False))
            place = next(n for n, pair in pairs if pair[0] != pair[1])
            problem = f"ids differ between transformers and sentencepiece from token {place} on"
            near = tokenizer.decode(ours[max(0, place - 3) : place + 4])
            raise UserError(f"tokenizer: {problem} ({near!r}); {cure}")
        compared += 1
    return compared
