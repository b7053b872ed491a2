"""The tokenizer of a run as a fast tokenizer of transformers that gives the same ids."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dynmoe.data.huggingface_tokenizer import TOKENIZER_CONFIG, TOKENIZER_JSON, HuggingFaceTokenizer
from dynmoe.data.sentencepiece_tokenizer import TOKENIZER_MODEL, SentencePieceTokenizer
from dynmoe.data.tokenizer import Tokenizer
from dynmoe.errors import UserError


def padding(tokenizer: Tokenizer) -> int:
    """Id of the padding piece.

    With byte fallback this is the unknown piece, which is then unused. EOD is the second choice: losses ignore padding,
    but the end of a text has to be learned.
    """
    return tokenizer.eod if tokenizer.unknown is None or not tokenizer.has_bytes else tokenizer.unknown


def write_tokenizer(tokenizer: Tokenizer, directory: Path, fields: Mapping[str, Any]) -> None:
    """Writes ``tokenizer.json`` with its configuration, and sentencepiece's own file if there is one.

    As in training, special tokens in a text stay text unless the corpora were prepared otherwise, and nothing is
    prepended to a text. Padding is on the left, as generation requires.

    Args:
        tokenizer: tokenizer of the run.
        directory: directory of the export.
        fields: fields of ``config.json``: ``max_position_embeddings`` and, optionally, ``bos_token_id``.
    """
    begin = tokenizer.eod if fields.get("bos_token_id") is None else fields["bos_token_id"]
    ids = {"bos_token": begin, "eos_token": tokenizer.eod, "pad_token": padding(tokenizer)}
    ids |= {} if tokenizer.unknown is None else {"unk_token": tokenizer.unknown}
    settings = {
        "tokenizer_class": "TokenizersBackend", "model_max_length": fields["max_position_embeddings"],
        "padding_side": "left", "split_special_tokens": not tokenizer.special_tokens,
        "clean_up_tokenization_spaces": False, **{name: tokenizer.piece(token) for name, token in ids.items()},
    }  # fmt: skip
    if isinstance(tokenizer, SentencePieceTokenizer):
        _write_sentencepiece(tokenizer, directory, settings)
    else:
        assert isinstance(tokenizer, HuggingFaceTokenizer)
        (directory / TOKENIZER_JSON).write_bytes(tokenizer.without_post_processor())
        _write_json(directory / TOKENIZER_CONFIG, settings | {"add_bos_token": False})


def _write_sentencepiece(tokenizer: SentencePieceTokenizer, directory: Path, settings: Mapping[str, Any]) -> None:
    """Has transformers convert the model. Two further fields tell llama.cpp's converter what precedes a text."""
    from transformers import TokenizersBackend

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / TOKENIZER_MODEL).write_bytes(tokenizer.content)
        _write_json(Path(folder) / TOKENIZER_CONFIG, settings)
        fast = TokenizersBackend.from_pretrained(folder)
    fast.save_pretrained(directory)
    path = directory / TOKENIZER_CONFIG
    before = {"add_bos_token": False, "add_prefix_space": tokenizer.adds_space}
    _write_json(path, json.loads(path.read_text()) | before)
    (directory / TOKENIZER_MODEL).write_bytes(tokenizer.content)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def compare(tokenizer: Tokenizer, directory: Path, texts: Iterable[str], cure: str) -> int:
    """Compares the tokenizer that transformers loads from ``directory`` with that of training.

    Args:
        tokenizer: tokenizer of the run.
        directory: directory of the other tokenizer.
        texts: texts to encode with both, without tokens before or after them.
        cure: the fix for a difference, for the error message.

    Returns:
        The number of texts.

    Raises:
        UserError: the ids of a text differ.
    """
    from transformers import AutoTokenizer

    encode = AutoTokenizer.from_pretrained(directory)
    split = not tokenizer.special_tokens
    compared = 0
    for text in texts:
        ours = tokenizer.encode(text)
        theirs = encode(text, add_special_tokens=False, split_special_tokens=split, verbose=False)["input_ids"]
        if ours != theirs:
            pairs = enumerate(zip([*ours, None], [*theirs, None], strict=False))
            place = next(n for n, pair in pairs if pair[0] != pair[1])
            problem = f"ids differ between transformers and {tokenizer.name} from token {place} on"
            near = tokenizer.decode(ours[max(0, place - 3) : place + 4])
            raise UserError(f"tokenizer: {problem} ({near!r}); {cure}")
        compared += 1
    return compared
