"""A run as a model of transformers: weights, configuration, tokenizer, and code where transformers has none."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from shutil import rmtree
from typing import Any

import torch
from torch import Tensor

from dynmoe.data.corpus import Corpus
from dynmoe.data.tokenizer import Tokenizer
from dynmoe.errors import UserError
from dynmoe.hf import qwen2_moe
from dynmoe.hf.bundle import write_code
from dynmoe.hf.formats import standard_architecture, to_transformers
from dynmoe.hf.kept import Kept
from dynmoe.hf.names import parts
from dynmoe.hf.routers import router_state
from dynmoe.hf.tokenizer import compare, padding, write_tokenizer
from dynmoe.train.checkpoint import IMPORTED
from dynmoe.train.run_directory import RunDirectory
from dynmoe.train.tensor_files import follow_umask
from dynmoe.trained import TrainedDecoder, open_decoder, open_trained

_GENERATION = "generation_config.json"
_TEXTS_COMPARED = 200
_SHARD = "5GB"


@dataclass(frozen=True)
class Export:
    """What was written.

    Attributes:
        architecture: in transformers.
        parameters: their number.
        tokenizer: whether there is one.
        texts: that it was compared with sentencepiece on.
    """

    architecture: str
    parameters: int
    tokenizer: bool
    texts: int


def export(run: Path, output: Path, dtype: torch.dtype = torch.float32, own_code: bool = False) -> Export:
    """Writes the newest sound checkpoint of a run, of either engine, so that ``from_pretrained`` reads it.

    A model that transformers has an architecture for (a dense one, or top-k) needs no code; any other takes ours along.
    What an imported checkpoint said about positions, special tokens, tokenizer and generation goes out as it came in.

    Args:
        run: directory of the run.
        output: directory of the export; must not exist.
        dtype: of the weights; the state of routers keeps its precision.
        own_code: take our code along in any case.

    Raises:
        UserError: no run, no sound checkpoint, an output that exists, or a tokenizer that transformers cannot rebuild.
    """
    if output.exists():
        raise UserError(f"OUT: {output} exists; name a new directory")
    kept = Kept.of(run)
    model, tokenizer = _open(run, kept)
    standard = None if own_code or _is_biased(model) else standard_architecture(model.config.model)
    maker, rows = standard or "dynmoe", model.decoder.w_embed_VD.shape[0]
    fields = own_fields(model, tokenizer, kept)
    config = to_transformers(model.config, maker, rows) | fields | {"dtype": str(dtype).removeprefix("torch.")}
    if maker == "dynmoe":
        config["router"] |= router_state(model.decoder)
    tensors = _tensors(model, maker, dtype)
    building = output.with_name(f"{output.name}.tmp-{secrets.token_hex(4)}")
    building.mkdir(parents=True)
    try:
        kept.write(building)
        texts = 0
        if tokenizer is not None:
            if not kept.has_tokenizer:
                write_tokenizer(tokenizer, building, fields)
            if not (building / _GENERATION).exists():
                _write_json(building / _GENERATION, _generation(tokenizer, fields, rows))
            came = f"remove tokenizer.json and tokenizer_config.json from {run / IMPORTED}, and they are made anew"
            cure = came if kept.has_tokenizer else "prepare the corpus with a tokenizer of data_prep's"
            texts = compare(tokenizer, building, _texts(model, tokenizer), cure)
        _write_json(building / "config.json", config)
        if maker == "dynmoe":
            write_code(building)
        _save(tensors, building)
        building.rename(output)
    except BaseException:
        rmtree(building)
        raise
    parameters = sum(tensor.numel() for tensor in tensors.values())
    return Export(maker, parameters, kept.has_tokenizer or tokenizer is not None, texts)


def _open(run: Path, kept: Kept) -> tuple[TrainedDecoder, Tokenizer | None]:
    """The model, and sentencepiece's tokenizer, which only a run may lack that was imported without."""
    if kept.files and not RunDirectory(run).tokenizer.exists():
        return open_decoder(run, torch.device("cpu")), None
    model = open_trained(run, torch.device("cpu"))
    return model, model.tokenizer


def own_fields(model: TrainedDecoder, tokenizer: Tokenizer | None, kept: Kept) -> dict[str, Any]:
    """The longest sequence, and the tokens that begin, end and fill up: as they were imported, where they were."""
    # A document begins where another ends: a piece for beginnings, where there is one, was never trained.
    # Nor is a piece for padding, whose embedding transformers trains no further; OLMoE has one unless a file says none.
    ids: dict[str, int | None] = {}
    if tokenizer is not None:
        ids = {"bos_token_id": tokenizer.eod, "eos_token_id": tokenizer.eod, "pad_token_id": None}
    before, trained = kept.fields.get("max_position_embeddings", 0), model.config.data.sequence_length
    longest = max(before, trained) if model.step or not before else before
    return ids | kept.fields | {"max_position_embeddings": longest}


def _generation(tokenizer: Tokenizer, fields: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """Begin, end and padding of a text; rows of the embedding that stand for no piece are never drawn."""
    ids = {"pad_token_id": padding(tokenizer)}
    ids |= {name: value for name, value in fields.items() if name.endswith("_token_id") and value is not None}
    unused = list(range(tokenizer.vocab_size, rows))
    return ids | ({"suppress_tokens": unused} if unused else {})


def _is_biased(model: TrainedDecoder) -> bool:
    """Whether a top-k choice adds something to its scores, or lacks experts, which no other architecture knows."""
    buffers = dict(model.decoder.named_buffers())
    biased = any(bool(buffer.any()) for name, buffer in buffers.items() if name.endswith("router.bias_E"))
    return biased or any(not bool(mask.all()) for name, mask in buffers.items() if name.endswith("router.active_E"))


def _tensors(model: TrainedDecoder, maker: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """All tensors of the export, by name; none shares its memory with another."""
    own = {**dict(model.decoder.named_parameters()), **dict(model.decoder.named_buffers())}
    made: dict[str, Tensor] = {}
    for part in parts(model.config.model, model.decoder.w_embed_VD.shape[0], maker):
        whole = own[part.ours].detach()
        whole = whole if part.expert is None else whole[part.expert]
        pieces = whole.split(part.rows) if part.rows else [whole]
        for name, piece in zip(part.theirs, pieces, strict=True):
            made[name] = piece.to(whole.dtype if part.state else dtype, copy=True).contiguous()
    if maker == "qwen2_moe":
        for name in qwen2_moe.down_projections(model.config.model):
            made[name] /= qwen2_moe.GATE_OF_ZEROS
        made |= {name: torch.zeros(shape, dtype=dtype) for name, shape in qwen2_moe.zeros(model.config.model).items()}
    return made


def _texts(model: TrainedDecoder, tokenizer: Tokenizer) -> Iterator[str]:
    """Documents of the validation text, as far as the corpora of the run are still there."""
    for folder in model.config.data.dirs:
        if not Path(folder).is_dir():
            continue
        corpus = Corpus.open(folder)
        if corpus.tokenizer.sha256 != tokenizer.sha256:
            continue
        for tokens in islice(corpus.splits["validation"].documents(), _TEXTS_COMPARED):
            yield tokenizer.decode([token for token in tokens if token != tokenizer.eod])


def _save(tensors: dict[str, Tensor], directory: Path) -> None:
    from huggingface_hub import save_torch_state_dict

    save_torch_state_dict(tensors, directory, max_shard_size=_SHARD, metadata={"format": "pt"})
    for path in directory.glob("*.safetensors"):
        follow_umask(path)


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
