"""The tensors of a checkpoint in safetensors, and the way into the plain model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dynmoe.errors import UserError, first_line, some
from dynmoe.hf import qwen2_moe
from dynmoe.hf.names import STACKED, parts
from dynmoe.model import Decoder

_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
# Families whose experts lie in tensors of their own, but in a state_dict of transformers 5.
_BY_EXPERT = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe")
_MASK = ("dynmoe", "BOOL", "active")  # of the experts in use
_FLOATS = ("F64", "F32", "BF16", "F16")


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

    Args:
        source: directory of the checkpoint.

    Raises:
        UserError: there are no such files, one of them is damaged, or mlx-lm has made it.
    """

    def __init__(self, source: Path) -> None:
        self.source = source
        self._file_of: dict[str, Any] = {}
        for path in self._files():
            try:
                file = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise UserError(f"{path}: {first_line(error)}; restore it") from None
            if (file.metadata() or {}).get("format") == "mlx":
                problem = "mlx-lm has converted it, which names, stacks and packs tensors in ways of its own"
                raise UserError(f"{path}: {problem}; import the folder that it was converted from")
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

    def are_zeros(self, name: str) -> bool:
        """Whether a tensor is of zeros and not quantized."""
        return self._file_of[name].get_slice(name).get_dtype() in _FLOATS and not bool(self.read(name).any())


@torch.no_grad()
def fill(decoder: Decoder, tensors: Tensors, maker: str) -> None:
    """Puts the tensors of a checkpoint of ``maker`` into their places.

    Raises:
        UserError: what is missing, surplus, of another shape, quantized, not finite or not zeros, where nothing else
            can be computed, each by name.
    """
    kinds, model = tensors.kinds(), decoder.settings
    zeros, halved = {}, []
    if maker == "qwen2_moe":
        zeros, halved = qwen2_moe.zeros_in(model, tensors), qwen2_moe.down_projections(model)
    if maker in _BY_EXPERT and any(name.endswith(".experts.gate_up_proj") for name in kinds):
        maker = STACKED
    wanted = list(parts(model, decoder.w_embed_VD.shape[0], maker))
    quantized = [
        f"{name} is {kind}"
        for name, kind in sorted(kinds.items())
        if kind not in _FLOATS and (maker, kind, name.rpartition(".")[2]) != _MASK
    ]
    if quantized:
        cure = "quantized weights are not read: save them in bf16 or fp32 first"
        raise UserError(f"{tensors.source}: {some(quantized)}; {cure}")
    shapes = {name: shape for part in wanted for name, shape in part.shapes.items()}
    _check_shapes(tensors, shapes | zeros, model.tie_embeddings)
    qwen2_moe.check_zeros(tensors, zeros)
    own = {**dict(decoder.named_parameters()), **dict(decoder.named_buffers())}
    for part in wanted:
        place = own[part.ours] if part.expert is None else own[part.ours][part.expert]
        for name, rows in zip(part.theirs, place.split(part.rows) if part.rows else [place], strict=True):
            rows.copy_(tensors.read(name))
            if name in halved:
                rows.mul_(qwen2_moe.GATE_OF_ZEROS)


def _check_shapes(tensors: Tensors, wanted: dict[str, tuple[int, ...]], tied: bool) -> None:
    found = {name: shape for name, shape in tensors.shapes().items() if not name.endswith("rotary_emb.inv_freq")}
    output, embedding = "lm_head.weight", "model.embed_tokens.weight"
    if tied and output in found and embedding in found and torch.equal(tensors.read(output), tensors.read(embedding)):
        del found[output]  # written twice
    missing, surplus = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    problems = [f"missing: {some(missing)}"] if missing else []
    problems += [f"surplus: {some(surplus)}"] if surplus else []
    shapes = [
        f"{name} has shape {found[name]} where {shape} is wanted"
        for name, shape in sorted(wanted.items())
        if name in found and found[name] != shape
    ]
    if shapes:
        problems.append(some(shapes))
    if problems:
        raise UserError(f"{tensors.source}: its tensors do not fit config.json; {'; '.join(problems)}")
