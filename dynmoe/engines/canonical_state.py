"""The canonical form of model and optimizer state: safetensors files that are independent of engine and layout.

Every fp32 master and moment is written whole under its parameter's name in :class:`dynmoe.model.Decoder`, each expert
separately under its global index; before the first step there are no moments. Checkpoints of DeepSpeed runs have this
form, because DeepSpeed's own are pickles for one layout. ``dynmoe.convert`` converts other checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dynmoe.engines.state_names import MASTER, OPTIMIZER_STEP, buffer_key, parameter_key
from dynmoe.errors import UserError, first_line, some
from dynmoe.moe import MoELayer
from dynmoe.train.tensor_files import save_tensors

_DENSE = "dense.safetensors"


@dataclass(frozen=True)
class Entry:
    """This rank's part of a parameter.

    Attributes:
        name: name in the canonical form.
        shape: shape of this rank's part; the first dimension is the expert if ``experts`` is given.
        experts: global indices of the experts, for a stacked parameter.
        num_experts: number of experts in the layer, on all ranks.
        moments: names of the moments of the optimizer.
        get: returns fp32 master and moments, by part. May be collective.
        set: sets these and the parameter.
    """

    name: str
    shape: tuple[int, ...]
    experts: range | None
    num_experts: int
    moments: tuple[str, ...]
    get: Callable[[], dict[str, Tensor]]
    set: Callable[[dict[str, Tensor]], None]


def expert_ranges(layers: Iterable[MoELayer]) -> dict[int, tuple[range, int]]:
    """Global indices of the experts, and number of experts in the layer, by ``id`` of each stacked parameter."""
    return {id(p): (layer.experts.experts, layer.num_experts) for layer in layers for p in layer.experts.parameters()}


def entry(
    name: str,
    parameter: nn.Parameter,
    shape: tuple[int, ...],
    ranges: dict[int, tuple[range, int]],
    moments: tuple[str, ...],
    get: Callable[[], dict[str, Tensor]],
    put: Callable[[dict[str, Tensor]], None],
) -> Entry:
    """The entry of a parameter, of which this rank has ``shape``, with ``ranges`` from :func:`expert_ranges`."""
    experts, num_experts = ranges.get(id(parameter), (None, 0))
    return Entry(name, shape, experts, num_experts, moments, get, put)


def copy(
    directory: Path,
    entries: Iterable[Entry],
    buffers: dict[str, Tensor],
    step: int,
    writes_dense: bool = True,
    writes_experts: bool = True,
) -> Callable[[], list[Path]]:
    """Copies this rank's share to host memory; returns a function that writes it and returns the files.

    Args:
        directory: directory of the checkpoint.
        entries: entries of all parameters on this rank.
        buffers: buffers by their canonical names.
        step: number of optimizer steps taken.
        writes_dense: whether this rank writes the replicated parameters and the buffers.
        writes_experts: whether this rank writes its experts.
    """
    dense: dict[str, Tensor] = {}
    experts: dict[str, Tensor] = {}
    for own in entries:
        for part, value in own.get().items():
            if step == 0 and part != MASTER:
                continue  # all moments are zero
            if own.experts is None and writes_dense:
                dense[parameter_key(own.name, part)] = _copy(value)
            elif own.experts is not None and writes_experts:
                rows = zip(own.experts, _copy(value), strict=True)
                experts |= {parameter_key(own.name, part, expert): row for expert, row in rows}
    files = {}
    rank = dist.get_rank() if dist.is_initialized() else 0
    if writes_dense:
        dense[OPTIMIZER_STEP] = torch.tensor(step)
        dense |= {buffer_key(name): _copy(buffer) for name, buffer in buffers.items()}
        files[directory / _DENSE] = dense
    if experts:
        files[directory / f"experts_{rank:05d}.safetensors"] = experts

    def write() -> list[Path]:
        for path, tensors in files.items():
            save_tensors(tensors, path)
        return list(files)

    return write


def _copy(value: Tensor) -> Tensor:
    """A contiguous copy in host memory, which in-place updates of the optimizer do not affect."""
    return torch.empty(value.shape, dtype=value.dtype).copy_(value)


def load(directory: Path, entries: Iterable[Entry], buffers: dict[str, Tensor]) -> int:
    """Restores this rank's share, under the current layout, of what :func:`copy` wrote; returns the optimizer's step.

    Raises:
        UserError: names tensors that are missing, unexpected or of another shape.
    """
    reader = _reader(directory)
    step = int(reader.read(OPTIMIZER_STEP, ()))
    expected: set[str] = {OPTIMIZER_STEP}
    for own in entries:
        values = {moment: torch.zeros(own.shape) for moment in own.moments}
        for part in (MASTER, *own.moments) if step > 0 else (MASTER,):
            values[part] = reader.read_part(own.name, part, own.shape, own.experts)
            if own.experts is None:
                expected.add(parameter_key(own.name, part))
            else:
                expected |= {parameter_key(own.name, part, e) for e in range(own.num_experts)}
        own.set(values)
    for name, buffer in buffers.items():
        buffer.copy_(reader.read(buffer_key(name), tuple(buffer.shape)))
        expected.add(buffer_key(name))
    if unexpected := sorted(reader.names - expected):
        cure = "resume with the configuration of the checkpoint"
        raise UserError(f"checkpoint {directory}: has tensors that this model lacks: {some(unexpected)}; {cure}")
    return step


def load_weights(directory: Path, module: nn.Module, layers: Iterable[MoELayer]) -> None:
    """Restores parameters (from the fp32 masters) and buffers of a whole model, for use without an optimizer.

    Raises:
        UserError: names a tensor that is missing or of another shape.
    """
    reader = _reader(directory)
    ranges = expert_ranges(layers)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            experts, _ = ranges.get(id(parameter), (None, 0))
            parameter.copy_(reader.read_part(name, MASTER, tuple(parameter.shape), experts))
        for name, buffer in module.named_buffers():
            buffer.copy_(reader.read(buffer_key(name), tuple(buffer.shape)))


def read_shape(directory: Path, name: str) -> tuple[int, ...]:
    """Shape of a replicated parameter, by its canonical name."""
    with _open(directory / _DENSE) as file:
        return tuple(file.get_slice(parameter_key(name, MASTER)).get_shape())


def read_tensor(directory: Path, key: str) -> Tensor:
    """A replicated tensor, by its key."""
    with _open(directory / _DENSE) as file:
        return file.get_tensor(key)


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise UserError(f"checkpoint {path}: {first_line(error)}; resume from another checkpoint") from None


class _Reader:
    """Reads tensors by name from several safetensors files, one at a time."""

    def __init__(self, paths: list[Path]) -> None:
        self._files = [_open(path) for path in paths]
        self._file_of = {name: file for file in self._files for name in file.keys()}  # noqa: SIM118

    @property
    def names(self) -> set[str]:
        return set(self._file_of)

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if name not in self._file_of:
            raise UserError(f"checkpoint: tensor {name} is missing; resume with the configuration of the checkpoint")
        tensor = self._file_of[name].get_tensor(name)
        if tuple(tensor.shape) != shape:
            problem = f"has shape {tuple(tensor.shape)}, but this model needs {shape}"
            raise UserError(f"checkpoint: tensor {name} {problem}; resume with the configuration of the checkpoint")
        return tensor

    def read_part(self, name: str, part: str, shape: tuple[int, ...], experts: range | None) -> Tensor:
        """Master or moment of a parameter, or of ``experts`` of a stacked parameter."""
        if experts is None:
            return self.read(parameter_key(name, part), shape)
        return torch.stack([self.read(parameter_key(name, part, expert), shape[1:]) for expert in experts])


def _reader(directory: Path) -> _Reader:
    return _Reader([directory / _DENSE, *sorted(directory.glob("experts_*.safetensors"))])
