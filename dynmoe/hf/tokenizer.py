"""Our sentencepiece model as a fast tokenizer of transformers that gives the same ids."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dynmoe.data.tokenizer import Tokenizer
from dynmoe.errors import UserError


def padding(tokenizer: Tokenizer) -> int:
    """Id of the piece that fills batches up.

    Where bytes stand for unknown characters the unknown piece is free: what pads is left out of losses, and the end of
    a text is to be learnt.
    """
    return tokenizer.unknown if tokenizer.has_bytes else tokenizer.eod


def write_tokenizer(tokenizer: Tokenizer, directory: Path, fields: Mapping[str, Any]) -> None:
    """Writes ``tokenizer.json`` and its configuration, and sentencepiece's own file beside them.

    Text is text: ``</s>`` in it is four characters, as it was in training. Padding comes on the left, where generation
    wants it. Whether a space or a token comes before a text stands in two fields more, which transformers needs not:
    llama.cpp's converter goes by them.

    Args:
        tokenizer: of the run.
        directory: of the export.
        fields: of the model: ``max_position_embeddings``, and ``bos_token_id`` of the piece that begins a text.
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
    """Encodes texts with the tokenizer that transformers reads from ``directory``, and with sentencepiece.

    Args:
        tokenizer: of the run.
        directory: of the other.
        texts: to be encoded by both, without special tokens.
        cure: what to do where they differ.

    Returns:
        How many there were.

    Raises:
        UserError: ids of one of them differ.
    """
    from transformers import AutoTokenizer

    theirs_of, compared = AutoTokenizer.from_pretrained(directory), 0
    for text in texts:
        ours = tokenizer.encode(text)
        theirs = theirs_of(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        if ours != theirs:
            place = next(
                n for n, pair in enumerate(zip([*ours, None], [*theirs, None], strict=False)) if pair[0] != pair[1]
            )
            near = tokenizer.decode(ours[max(0, place - 3) : place + 4])
            raise UserError(
                f"tokenizer: transformers gives other ids than sentencepiece from token {place} on ({near!r}); {cure}"
            )
        compared += 1
    return compared
