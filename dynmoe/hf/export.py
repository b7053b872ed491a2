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
from dynmoe.hf.bundle import write_code
from dynmoe.hf.formats import standard_architecture, to_transformers
from dynmoe.hf.names import parts
from dynmoe.hf.tokenizer import padding, write_tokenizer
from dynmoe.trained import TrainedModel, open_trained

_TEXTS_COMPARED = 200
_SHARD = "5GB"


@dataclass(frozen=True)
class Export:
    """What was written: the architecture, its parameters, and the texts that the tokenizer was tried on."""

    architecture: str
    parameters: int
    texts: int


def export(run: Path, output: Path, dtype: torch.dtype = torch.float32, own_code: bool = False) -> Export:
    """Writes the newest sound checkpoint of a run, of either engine, so that ``from_pretrained`` reads it.

    A model that transformers has an architecture for (a dense one, or top-k) needs no code; any other takes ours along.

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
    model = open_trained(run, torch.device("cpu"))
    settings = model.config.model
    standard = None if own_code or _is_biased(model) else standard_architecture(settings)
    maker = standard or "dynmoe"
    positions, rows = model.config.data.sequence_length, model.decoder.w_embed_VD.shape[0]
    tensors = _tensors(model, maker, dtype)
    building = output.with_name(f"{output.name}.tmp-{secrets.token_hex(4)}")
    building.mkdir(parents=True)
    try:
        config = to_transformers(settings, maker, rows, positions, model.tokenizer.eod)
        config["dtype"] = str(dtype).removeprefix("torch.")
        _write_json(building / "config.json", config)
        texts = write_tokenizer(model.tokenizer, building, positions, _texts(model))
        _write_json(building / "generation_config.json", _generation(model.tokenizer, rows))
        if maker == "dynmoe":
            write_code(building)
        _save(tensors, building)
        building.rename(output)
    except BaseException:
        rmtree(building)
        raise
    return Export(maker, sum(tensor.numel() for tensor in tensors.values()), texts)


def _generation(tokenizer: Tokenizer, rows: int) -> dict[str, Any]:
    """Begin, end and padding of a text; rows of the embedding that stand for no piece are never drawn."""
    ids = {"bos_token_id": tokenizer.eod, "eos_token_id": tokenizer.eod, "pad_token_id": padding(tokenizer)}
    unused = list(range(tokenizer.vocab_size, rows))
    return ids | ({"suppress_tokens": unused} if unused else {})


def _is_biased(model: TrainedModel) -> bool:
    """Whether a top-k choice adds something to its scores, or lacks experts, which no other architecture knows."""
    buffers = dict(model.decoder.named_buffers())
    biased = any(bool(buffer.any()) for name, buffer in buffers.items() if name.endswith("router.bias_E"))
    return biased or any(not bool(mask.all()) for name, mask in buffers.items() if name.endswith("router.active_E"))


def _tensors(model: TrainedModel, maker: str, dtype: torch.dtype) -> dict[str, Tensor]:
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
        _gate_shared_experts(model, made, dtype)
    return made


def _gate_shared_experts(model: TrainedModel, made: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Qwen2-MoE multiplies its shared expert by the sigmoid of a gate: one half for a gate of zeros."""
    hidden, width = model.config.model.hidden, model.config.model.moe.shared_hidden
    for layer in model.config.model.moe_layers:
        prefix = f"model.layers.{layer}.mlp"
        made[f"{prefix}.shared_expert_gate.weight"] = torch.zeros(1, hidden, dtype=dtype)
        if width:
            made[f"{prefix}.shared_expert.down_proj.weight"] *= 2
        else:
            shapes = {"gate_proj": (0, hidden), "up_proj": (0, hidden), "down_proj": (hidden, 0)}
            made |= {f"{prefix}.shared_expert.{n}.weight": torch.empty(s, dtype=dtype) for n, s in shapes.items()}


def _texts(model: TrainedModel) -> Iterator[str]:
    """Documents of the validation text, as far as the corpora of the run are still there."""
    for folder in model.config.data.dirs:
        if not Path(folder).is_dir():
            continue
        corpus = Corpus.open(folder)
        if corpus.tokenizer.sha256 != model.tokenizer.sha256:
            continue
        for tokens in islice(corpus.splits["validation"].documents(), _TEXTS_COMPARED):
            yield model.tokenizer.decode([token for token in tokens if token != model.tokenizer.eod])


def _save(tensors: dict[str, Tensor], directory: Path) -> None:
    from huggingface_hub import save_torch_state_dict

    save_torch_state_dict(tensors, directory, max_shard_size=_SHARD, metadata={"format": "pt"})


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
