"""The tensors of a checkpoint in safetensors, and the way into the plain model."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dynmoe.errors import UserError, first_line
from dynmoe.hf.names import STACKED, parts
from dynmoe.model import Decoder

_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_FLOATS = ("F64", "F32", "BF16", "F16")
_MOST_NAMES = 8


def read_json(path: Path) -> dict[str, Any]:
    """An object of JSON.

    Raises:
        UserError: no such file, or something else in it.
    """
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; name a directory with a checkpoint") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {first_line(error)}; restore it") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not the configuration of a model; restore it")
    return content


class Tensors:
    """Tensors by name over the safetensors files of a checkpoint, read one at a time.

    As in transformers a whole file comes before shards, and the last of several shards with one name counts.
    """

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
        if (self.source / _WHOLE).is_file():
            yield self.source / _WHOLE
            return
        if not (self.source / _INDEX).is_file():
            cure = "pickles are not read, as they can execute code: save it as safetensors"
            raise UserError(f"{self.source}: has neither {_WHOLE} nor {_INDEX}; {cure}")
        names = read_json(self.source / _INDEX).get("weight_map")
        if not isinstance(names, dict) or any(not isinstance(n, str) or "/" in n for n in names.values()):
            raise UserError(f"{self.source / _INDEX}: is not an index of files beside it; restore it")
        yield from sorted({self.source / name for name in names.values()})

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(file.get_slice(name).get_shape()) for name, file in self._file_of.items()}

    def kinds(self) -> dict[str, str]:
        """Element types as safetensors calls them, such as BF16."""
        return {name: file.get_slice(name).get_dtype() for name, file in self._file_of.items()}

    def read(self, name: str) -> Tensor:
        """One tensor.

        Raises:
            UserError: some of its values are infinite or no numbers.
        """
        tensor: Tensor = self._file_of[name].get_tensor(name)
        if tensor.numel() and not all(bool(end.isfinite()) for end in tensor.aminmax()):  # takes no memory
            problem = f"{name} has {int((~tensor.isfinite()).sum())} values that are not finite"
            raise UserError(f"{self.source}: {problem}; use an undamaged checkpoint")
        return tensor


@torch.no_grad()
def fill(decoder: Decoder, tensors: Tensors, maker: str) -> None:
    """Puts the tensors of a checkpoint of ``maker`` into their places.

    Raises:
        UserError: what is missing, surplus, of another shape, quantized or not finite, each by name.
    """
    kinds, model = tensors.kinds(), decoder.settings
    if maker in ("mixtral", "olmoe", "qwen3_moe") and any(name.endswith(".experts.gate_up_proj") for name in kinds):
        maker = STACKED
    quantized = [f"{name} is {kind}" for name, kind in sorted(kinds.items()) if kind not in _FLOATS]
    if quantized:
        cure = "quantized weights are not read: save them in bf16 or fp32 first"
        raise UserError(f"{tensors.source}: {_some(quantized)}; {cure}")
    wanted = list(parts(model, decoder.w_embed_VD.shape[0], maker))
    shapes = {name: shape for part in wanted for name, shape in part.shapes.items()}
    _check_shapes(tensors, shapes, model.tie_embeddings)
    own = {**dict(decoder.named_parameters()), **dict(decoder.named_buffers())}
    for part in wanted:
        place = own[part.ours] if part.expert is None else own[part.ours][part.expert]
        for name, rows in zip(part.theirs, place.split(part.rows) if part.rows else [place], strict=True):
            rows.copy_(tensors.read(name))


def _check_shapes(tensors: Tensors, wanted: dict[str, tuple[int, ...]], tied: bool) -> None:
    found = {name: shape for name, shape in tensors.shapes().items() if not name.endswith("rotary_emb.inv_freq")}
    output, embedding = "lm_head.weight", "model.embed_tokens.weight"
    if tied and output in found and embedding in found and torch.equal(tensors.read(output), tensors.read(embedding)):
        del found[output]  # written twice
    missing, surplus = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    problems = [f"missing: {_some(missing)}"] if missing else []
    problems += [f"surplus: {_some(surplus)}"] if surplus else []
    shapes = [
        f"{name} has shape {found[name]} where {shape} is wanted"
        for name, shape in sorted(wanted.items())
        if name in found and found[name] != shape
    ]
    if shapes:
        problems.append(_some(shapes))
    if problems:
        raise UserError(f"{tensors.source}: its tensors do not fit config.json; {'; '.join(problems)}")


def _some(words: Collection[str]) -> str:
    """A list in one line that can be read."""
    further = len(words) - _MOST_NAMES
    return ", ".join(list(words)[:_MOST_NAMES]) + (f" and {further} more" if further > 0 else "")
