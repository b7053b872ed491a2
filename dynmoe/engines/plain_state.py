"""Model and optimizer state in the plain model's names and layout, as safetensors files that fit any layout.

Every fp32 master and moment is written whole under its parameter's name, each expert for itself under its global
index; before the first step there are no moments. DeepSpeed runs keep their checkpoints so (its own pickle, know
experts by one name pattern and fit one layout); what turns other checkpoints into these is ``dynmoe.convert``.
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

from dynmoe.engines.state_names import MASTER, MOMENTS, OPTIMIZER_STEP, buffer_key, parameter_key
from dynmoe.errors import UserError, first_line, some
from dynmoe.moe import MoELayer
from dynmoe.train.tensor_files import save_tensors

_DENSE = "dense.safetensors"


@dataclass(frozen=True)
class Entry:
    """A parameter of the plain model, as far as this rank holds it.

    Attributes:
        name: in the plain model.
        shape: of what this rank holds; its first dimension counts experts where ``experts`` is given.
        experts: global indices of the experts, for a stacked parameter.
        num_experts: experts of its layer in all.
        get: fp32 master and moments, by part. May be collective.
        set: puts them in place, and the parameter itself.
    """

    name: str
    shape: tuple[int, ...]
    experts: range | None
    num_experts: int
    get: Callable[[], dict[str, Tensor]]
    set: Callable[[dict[str, Tensor]], None]


def expert_ranges(layers: Iterable[MoELayer]) -> dict[int, tuple[range, int]]:
    """By ``id`` of each stacked parameter: global indices of its experts, and experts of its layer in all."""
    return {id(p): (layer.experts.experts, layer.num_experts) for layer in layers for p in layer.experts.parameters()}


def entry(
    name: str,
    parameter: nn.Parameter,
    ranges: dict[int, tuple[range, int]],
    get: Callable[[], dict[str, Tensor]],
    put: Callable[[dict[str, Tensor]], None],
) -> Entry:
    """The entry of a parameter; ``ranges`` are those of :func:`expert_ranges`."""
    experts, num_experts = ranges.get(id(parameter), (None, 0))
    return Entry(name, tuple(parameter.shape), experts, num_experts, get, put)


def copy(
    directory: Path,
    entries: Iterable[Entry],
    buffers: dict[str, Tensor],
    step: int,
    writes_dense: bool = True,
    writes_experts: bool = True,
) -> Callable[[], list[Path]]:
    """Copies this rank's share to host memory; what is returned writes it into ``directory``, and returns the files.

    Args:
        directory: of the checkpoint.
        entries: of every parameter that this rank holds.
        buffers: by their names in the plain model.
        step: optimizer steps taken.
        writes_dense, writes_experts: whether this rank writes what others hold too, and its experts.
    """
    dense: dict[str, Tensor] = {}
    experts: dict[str, Tensor] = {}
    for own in entries:
        for part, value in own.get().items():
            if step == 0 and part != MASTER:
                continue  # moments of zeros
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
    """In host memory, whole: what the optimizer changes in place must not change it."""
    return torch.empty(value.shape, dtype=value.dtype).copy_(value)


def load(directory: Path, entries: Iterable[Entry], buffers: dict[str, Tensor]) -> int:
    """Restores what :func:`copy` wrote, for this rank's share of the present layout; returns the optimizer's step.

    Raises:
        UserError: tensors that are missing, surplus or of another shape, by name.
    """
    reader = _reader(directory)
    step = int(reader.read(OPTIMIZER_STEP, ()))
    expected: set[str] = {OPTIMIZER_STEP}
    for own in entries:
        values = {moment: torch.zeros(own.shape) for moment in MOMENTS}
        for part in (MASTER, *MOMENTS) if step > 0 else (MASTER,):
            values[part] = reader.read_part(own.name, part, own.shape, own.experts)
            if own.experts is None:
                expected.add(parameter_key(own.name, part))
            else:
                expected |= {parameter_key(own.name, part, e) for e in range(own.num_experts)}
        own.set(values)
    for name, buffer in buffers.items():
        buffer.copy_(reader.read(buffer_key(name), tuple(buffer.shape)))
        expected.add(buffer_key(name))
    surplus = sorted(reader.names - expected)
    if surplus:
        raise UserError(f"checkpoint {directory}: has tensors that this model lacks: {some(surplus)}")
    return step


def load_weights(directory: Path, module: nn.Module, layers: Iterable[MoELayer]) -> None:
    """Restores parameters (from their fp32 masters) and buffers of a whole model, for use without an optimizer.

    Raises:
        UserError: tensors that are missing or of another shape, by name.
    """
    reader, ranges = _reader(directory), expert_ranges(layers)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            experts, _ = ranges.get(id(parameter), (None, 0))
            parameter.copy_(reader.read_part(name, MASTER, tuple(parameter.shape), experts))
        for name, buffer in module.named_buffers():
            buffer.copy_(reader.read(buffer_key(name), tuple(buffer.shape)))


def read_shape(directory: Path, name: str) -> tuple[int, ...]:
    """Shape of a parameter that all ranks share, by its name in the plain model."""
    with _open(directory / _DENSE) as file:
        return tuple(file.get_slice(parameter_key(name, MASTER)).get_shape())


def read_tensor(directory: Path, key: str) -> Tensor:
    """A tensor that all ranks share, by its key."""
    with _open(directory / _DENSE) as file:
        return file.get_tensor(key)


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise UserError(f"checkpoint {path}: {first_line(error)}; go on from another checkpoint") from None


class _Reader:
    """Tensors by name over several safetensors files, read one at a time."""

    def __init__(self, paths: list[Path]) -> None:
        self._files = [_open(path) for path in paths]
        self._file_of = {name: file for file in self._files for name in file.keys()}  # noqa: SIM118

    @property
    def names(self) -> set[str]:
        return set(self._file_of)

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if name not in self._file_of:
            raise UserError(f"checkpoint: tensor {name} is missing; resume with the configuration that made it")
        tensor = self._file_of[name].get_tensor(name)
        if tuple(tensor.shape) != shape:
            raise UserError(f"checkpoint: tensor {name} has shape {tuple(tensor.shape)}, this model wants {shape}")
        return tensor

    def read_part(self, name: str, part: str, shape: tuple[int, ...], experts: range | None) -> Tensor:
        """A parameter's master or moment; of a stacked one the rows of ``experts``."""
        if experts is None:
            return self.read(parameter_key(name, part), shape)
        return torch.stack([self.read(parameter_key(name, part, expert), shape[1:]) for expert in experts])


def _reader(directory: Path) -> _Reader:
    return _Reader([directory / _DENSE, *sorted(directory.glob("experts_*.safetensors"))])
