"""A run that begins from somebody else's checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dynmoe.config import Config, load_config
from dynmoe.data.corpus import TOKENIZER
from dynmoe.errors import UserError, first_line
from dynmoe.hf.formats import from_transformers
from dynmoe.hf.names import Part, parts
from dynmoe.model import Decoder
from dynmoe.trained import begin_run

_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def import_checkpoint(source: Path, output: Path, overrides: Sequence[str] = ()) -> tuple[str, Config]:
    """Makes the run directory ``output``, whose training starts from the weights in ``source``, with fresh moments.

    Known are the release of arXiv 2403.07652, Llama, Mixtral, OLMoE and Qwen3-MoE, in safetensors.

    Args:
        source: directory with ``config.json`` and the weights.
        output: directory of the new run; must not exist.
        overrides: of our configuration: engine, data, training.

    Returns:
        Whose checkpoint it was, and the configuration of the run.

    Raises:
        UserError: an unknown architecture, a setting that our decoder does not have, tensors that are missing, surplus
            or of another shape (each by name), or an output that exists.
    """
    maker, found = from_transformers(_read_json(source / "config.json"))
    run = [f"run.dir={output.parent}", f"run.name={output.name}"]
    config = load_config(None, [*found, *overrides, *run])
    vocab_size = config.model.vocab_size
    assert vocab_size is not None
    decoder = Decoder(config.model, vocab_size, config.train.seed)
    _fill(decoder, _Tensors(source), list(parts(config.model, vocab_size, maker)), config.model.tie_embeddings)
    tokenizer = source / TOKENIZER
    begin_run(config, decoder, tokenizer.read_bytes() if tokenizer.exists() else None, output)
    return maker, config


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; name a directory with a checkpoint") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {first_line(error)}; restore it") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not the configuration of a model; restore it")
    return content


class _Tensors:
    """Tensors by name over the safetensors files of a checkpoint, read one at a time."""

    def __init__(self, source: Path) -> None:
        self.source = source
        self._file_of: dict[str, Any] = {}
        for path in self._files():
            try:
                file = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise UserError(f"{path}: {first_line(error)}; restore it") from None
            self._file_of |= dict.fromkeys(file.keys(), file)

    def _files(self) -> Iterator[Path]:
        if (self.source / _INDEX).exists():
            names = _read_json(self.source / _INDEX).get("weight_map")
            if not isinstance(names, dict) or any(not isinstance(n, str) or "/" in n for n in names.values()):
                raise UserError(f"{self.source / _INDEX}: is not an index of files beside it; restore it")
            yield from sorted({self.source / name for name in names.values()})
            return
        if not (self.source / _WHOLE).exists():
            cure = "pickles are not read, as they can execute code: save it as safetensors"
            raise UserError(f"{self.source}: has neither {_WHOLE} nor {_INDEX}; {cure}")
        yield self.source / _WHOLE

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(file.get_slice(name).get_shape()) for name, file in self._file_of.items()}

    def read(self, name: str) -> Tensor:
        return self._file_of[name].get_tensor(name)


@torch.no_grad()
def _fill(decoder: Decoder, tensors: _Tensors, wanted: list[Part], tied: bool) -> None:
    """Puts the tensors of a checkpoint into their places.

    Raises:
        UserError: what is missing, surplus or of another shape, each by name.
    """
    shapes = {name: shape for part in wanted for name, shape in part.shapes.items()}
    found = {name: shape for name, shape in tensors.shapes().items() if not name.endswith("rotary_emb.inv_freq")}
    if (
        tied
        and "lm_head.weight" in found
        and torch.equal(tensors.read("lm_head.weight"), tensors.read(wanted[0].theirs[0]))
    ):
        del found["lm_head.weight"]  # written twice
    missing, surplus = sorted(shapes.keys() - found.keys()), sorted(found.keys() - shapes.keys())
    problems = [f"missing: {', '.join(missing)}"] if missing else []
    problems += [f"surplus: {', '.join(surplus)}"] if surplus else []
    problems += [
        f"{name} has shape {found[name]} where {shape} is wanted"
        for name, shape in sorted(shapes.items())
        if name in found and found[name] != shape
    ]
    if problems:
        raise UserError(f"{tensors.source}: its tensors do not fit config.json; {'; '.join(problems)}")
    own = {**dict(decoder.named_parameters()), **dict(decoder.named_buffers())}
    for part in wanted:
        place = own[part.ours] if part.expert is None else own[part.ours][part.expert]
        place.copy_(
            torch.cat([tensors.read(name) for name in part.theirs]) if part.rows else tensors.read(part.theirs[0])
        )
