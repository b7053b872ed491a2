"""Export of a run as a transformers model: weights, configuration, tokenizer and, if needed, modeling code."""

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

from dynmoe.config import ModelConfig, load_config
from dynmoe.data.corpus import Corpus
from dynmoe.data.tokenizer import Tokenizer
from dynmoe.errors import ConfigError, UserError
from dynmoe.hf import longcat, qwen2_moe
from dynmoe.hf.bundle import write_code
from dynmoe.hf.formats import latent_architecture, standard_architecture, to_transformers
from dynmoe.hf.kept import Kept
from dynmoe.hf.names import parts
from dynmoe.hf.routers import router_state
from dynmoe.hf.tokenizer import compare, padding, write_tokenizer
from dynmoe.model.rotary import neighbours
from dynmoe.train.checkpoint import IMPORTED
from dynmoe.train.run_directory import RunDirectory
from dynmoe.train.tensor_files import follow_umask
from dynmoe.trained import TrainedDecoder, open_decoder, open_trained

_GENERATION = "generation_config.json"
_TEXTS_COMPARED = 200
_SHARD = "5GB"


@dataclass(frozen=True)
class Export:
    """An exported model.

    Attributes:
        architecture: the ``model_type`` of transformers.
        parameters: number of parameters.
        tokenizer: whether the export has a tokenizer.
        texts: number of texts on which the tokenizer was compared with that of training.
    """

    architecture: str
    parameters: int
    tokenizer: bool
    texts: int


def export(run: Path, output: Path, dtype: torch.dtype = torch.float32, own_code: bool = False) -> Export:
    """Exports the latest valid checkpoint of a run, of either engine, for ``from_pretrained``.

    A model that transformers has an architecture for (dense, top-k, LongCat-Flash) needs no code; any other includes
    ours, which has no latent attention. An imported checkpoint's positions, special tokens, tokenizer and generation
    settings are exported unchanged.

    Args:
        run: directory of the run.
        output: directory of the export; must not exist.
        dtype: data type of the weights; router state keeps its precision.
        own_code: include our code in any case.

    Raises:
        UserError: no run, no valid checkpoint, an existing output, a model that neither can compute, or a tokenizer
            that transformers cannot rebuild.
    """
    if output.exists():
        raise UserError(f"OUT: {output} exists; name a new directory")
    kept = Kept.of(run)
    model, tokenizer = _open(run, kept, own_code)
    _check_supported(model.config.model, own_code)
    architecture = _architecture(model, own_code)
    rows = model.decoder.w_embed_VD.shape[0]
    fields = own_fields(model, tokenizer, kept)
    config = to_transformers(model.config, architecture, rows) | fields | {"dtype": str(dtype).removeprefix("torch.")}
    if architecture == "dynmoe":
        config["router"] |= router_state(model.decoder)
    tensors = _tensors(model, architecture, dtype)
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
            cure = "prepare the corpus with a tokenizer from data_prep"
            if kept.has_tokenizer:
                cure = f"remove tokenizer.json and tokenizer_config.json from {run / IMPORTED} to have them rebuilt"
            texts = compare(tokenizer, building, _texts(model, tokenizer), cure)
        _write_json(building / "config.json", config)
        if architecture == "dynmoe":
            write_code(building)
        _save(tensors, building)
        building.rename(output)
    except BaseException:
        rmtree(building)
        raise
    parameters = sum(tensor.numel() for tensor in tensors.values())
    return Export(architecture, parameters, kept.has_tokenizer or tokenizer is not None, texts)


def _check_supported(model: ModelConfig, own_code: bool) -> None:
    """Refuses models that neither an architecture of transformers nor our own code computes."""
    router = model.router
    if model.moe_layers and router.NEEDS_ATTENTION:
        problem = "needs the attention weights, which the attention of transformers and servers does not return"
        raise UserError(f"model.router.kind={router.kind!r}: {problem}; run it with python -m dynmoe.generate")
    if model.latent.enabled:
        architecture, error = latent_architecture(model)
        if error is not None:
            raise error
        if own_code:
            problem = "our code has no latent attention"
            raise UserError(f"--own-code: {problem}; without it, the run is exported as transformers' {architecture}")
    elif model.moe.shortcut:
        problem = "is exported with latent attention alone, as LongCat-Flash"
        raise ConfigError("model.moe.shortcut", True, problem, "run it with python -m dynmoe.generate")


def _architecture(model: TrainedDecoder, own_code: bool) -> str:
    """The ``model_type`` of the export."""
    standard = None if own_code else standard_architecture(model.config.model)
    if standard in ("deepseek_v3", "longcat_flash"):  # with biases, and routers that do not deactivate experts
        return standard
    return "dynmoe" if standard is None or _is_biased(model) or _has_inactive_experts(model) else standard


def _open(run: Path, kept: Kept, own_code: bool) -> tuple[TrainedDecoder, Tokenizer | None]:
    """The model and its tokenizer, which only a run that was imported without one may lack.

    Layers that predict further tokens have a place in DeepSeek-V3 alone.
    """
    directory = RunDirectory(run)
    mtp = not own_code and standard_architecture(load_config(directory.config).model) == "deepseek_v3"
    if kept.files and not directory.tokenizer.exists():
        return open_decoder(run, torch.device("cpu"), mtp=mtp), None
    model = open_trained(run, torch.device("cpu"), mtp=mtp)
    return model, model.tokenizer


def own_fields(model: TrainedDecoder, tokenizer: Tokenizer | None, kept: Kept) -> dict[str, Any]:
    """Fields of ``config.json`` for the maximum length and the special tokens; imported values take precedence."""
    # EOD also begins a document, because a BOS piece was never trained. No padding token is named, because transformers
    # does not train its embedding; an explicit null is required for OLMoE, whose default is token 1.
    ids: dict[str, int | None] = {}
    if tokenizer is not None:
        ids = {"bos_token_id": tokenizer.eod, "eos_token_id": tokenizer.eod, "pad_token_id": None}
    longest = kept.fields.get("max_position_embeddings", 0)
    if model.step or not longest:
        longest = max(longest, model.config.data.sequence_length)
    return ids | kept.fields | {"max_position_embeddings": longest}


def _generation(tokenizer: Tokenizer, fields: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """``generation_config.json``: special tokens, and suppression of embedding rows that represent no piece."""
    ids = {"pad_token_id": padding(tokenizer)}
    ids |= {name: value for name, value in fields.items() if name.endswith("_token_id") and value is not None}
    unused = list(range(tokenizer.vocab_size, rows))
    return ids | ({"suppress_tokens": unused} if unused else {})


def _is_biased(model: TrainedDecoder) -> bool:
    """Whether a top-k router has selection biases."""
    return any(bool(bias.any()) for name, bias in model.decoder.named_buffers() if name.endswith("router.bias_E"))


def _has_inactive_experts(model: TrainedDecoder) -> bool:
    return any(not mask.all() for name, mask in model.decoder.named_buffers() if name.endswith("router.active_E"))


def _tensors(model: TrainedDecoder, architecture: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """All tensors of the export by name; no two share memory."""
    own = {**dict(model.decoder.named_parameters()), **dict(model.decoder.named_buffers())}
    made: dict[str, Tensor] = {}
    for part in parts(model.config.model, model.decoder.w_embed_VD.shape[0], architecture):
        whole = own[part.ours].detach()
        whole = whole if part.expert is None else whole[part.expert]
        whole = neighbours(whole, *part.rotated) if part.rotated else whole
        pieces = whole.split(part.rows) if part.rows else [whole]
        for name, piece in zip(part.theirs, pieces, strict=True):
            made[name] = piece.to(whole.dtype if part.state else dtype, copy=True).contiguous()
    if architecture == "qwen2_moe":
        for name in qwen2_moe.down_projections(model.config.model):
            made[name] /= qwen2_moe.GATE_OF_ZEROS
    zeros = {"qwen2_moe": qwen2_moe.zeros, "longcat_flash": longcat.unread_projections}.get(architecture)
    if zeros is not None:
        made |= {name: torch.zeros(shape, dtype=dtype) for name, shape in zeros(model.config.model).items()}
    return made


def _texts(model: TrainedDecoder, tokenizer: Tokenizer) -> Iterator[str]:
    """Validation documents from the corpora of the run that still exist."""
    for folder in model.config.data.dirs:
        if not Path(folder).is_dir():
            continue
        corpus = Corpus.open(folder)
        if not corpus.tokenizer.encodes_like(tokenizer):
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
