"""Model and optimizer state of a DeepSpeed run as safetensors files that fit any layout.

DeepSpeed's own checkpoints pickle, know experts by one name pattern and fit one layout. Here every fp32 master and
moment is written whole under its parameter's name, each expert for itself under its global index: a run may go on
with other data- and expert-parallel sizes and another ZeRO stage.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.moe.utils import is_moe_param
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dynmoe.engines.state_names import MASTER, MOMENTS, OPTIMIZER_STEP, buffer_key, parameter_key
from dynmoe.errors import UserError
from dynmoe.model import Decoder
from dynmoe.moe import MoEContext


class OptimizerState:
    """fp32 masters and Adam moments of whole parameters, whatever DeepSpeed optimizer holds them.

    Reading is collective under ZeRO. The moments exist from the start (zeros), as after a first step of size zero.
    """

    def __init__(self, optimizer: Any, adam: torch.optim.AdamW) -> None:
        self._adam, self._optimizer = adam, optimizer
        self._partitioned = isinstance(optimizer, (DeepSpeedZeroOptimizer, BF16_Optimizer))
        self._masters: dict[int, Tensor] = {}
        if isinstance(optimizer, FP16_UnfusedOptimizer):  # bf16 without ZeRO
            pairs = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
            self._masters = {id(p): master for low, high in pairs for p, master in zip(low, high, strict=True)}
        if isinstance(optimizer, DeepSpeedZeroOptimizer):
            held = optimizer.single_partition_of_fp32_groups
        elif isinstance(optimizer, BF16_Optimizer):
            held = optimizer.fp32_groups_flat_partition
        else:
            held = [p for group in adam.param_groups for p in group["params"]]
        for tensor in held:
            adam.state[tensor] = {
                "step": torch.zeros((), dtype=torch.float32, device=tensor.device),
                **{name: torch.zeros_like(tensor) for name in MOMENTS},
            }
        if self._partitioned:
            # DeepSpeed links moments to parameters once, after the first group's first step, when the others have
            # none yet: linked here, with all of them in place.
            optimizer._hp_optimizer_states_linked = False
            optimizer._lazy_init_hp_params_optimizer_state()

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return int(next(iter(self._adam.state.values()))["step"].item())

    @step.setter
    def step(self, value: int) -> None:
        for state in self._adam.state.values():
            state["step"].fill_(value)

    def get(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Whole fp32 master and moments, on the parameter's device."""
        if self._partitioned:
            moments = {name: safe_get_full_optimizer_state(parameter, name) for name in MOMENTS}
            return {MASTER: safe_get_full_fp32_param(parameter), **moments}
        master = self._masters.get(id(parameter), parameter)
        return {MASTER: master.detach(), **{name: self._adam.state[master][name] for name in MOMENTS}}

    @torch.no_grad()
    def renew(self, parameter: nn.Parameter, index: tuple[int | slice, ...], fresh: Tensor) -> None:
        """See :class:`dynmoe.moe.adaptation.ParameterRenewal`."""
        values = {part: value.clone() for part, value in self.get(parameter).items()}
        for part, value in values.items():
            value[index] = fresh if part == MASTER else 0.0
        self.set(parameter, values)

    @torch.no_grad()
    def set(self, parameter: nn.Parameter, values: dict[str, Tensor]) -> None:
        """Puts whole values in place: master, moments, and the parameter itself."""
        parameter.copy_(values[MASTER])
        if self._partitioned:
            safe_set_full_fp32_param(parameter, values[MASTER].to(parameter.device))
            for name in MOMENTS:
                safe_set_full_optimizer_state(parameter, values[name].to(parameter.device), name)
            return
        master = self._masters.get(id(parameter), parameter)
        master.copy_(values[MASTER])
        for name in MOMENTS:
            self._adam.state[master][name].copy_(values[name])


def _expert_ranges(module: Decoder) -> dict[str, tuple[range, int]]:
    """Of each stacked parameter of this rank: global indices of its experts, and experts of its layer in all."""
    held = {
        id(p): (layer.experts.experts, layer.num_experts)
        for layer in module.moe_layers
        for p in layer.experts.parameters()
    }
    return {name: held[id(p)] for name, p in module.named_parameters() if id(p) in held}


def save(directory: Path, module: Decoder, state: OptimizerState, context: MoEContext) -> list[Path]:
    """Writes this rank's share into ``directory``: rank 0 the dense state, one replica of each expert its experts."""
    ranges, rank = _expert_ranges(module), dist.get_rank()
    # Consecutive ranks form an expert-parallel group: the first of them holds one replica of every expert.
    writes_experts, writes_dense = rank < context.expert_parallel, rank == 0
    dense: dict[str, Tensor] = {}
    experts: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        for part, value in state.get(parameter).items():
            if not is_moe_param(parameter):
                if writes_dense:
                    dense[parameter_key(name, part)] = value.cpu().contiguous()
            elif writes_experts:
                cpu = value.cpu()
                experts |= {parameter_key(name, part, e): cpu[i].contiguous() for i, e in enumerate(ranges[name][0])}
    files = []
    if writes_dense:
        dense[OPTIMIZER_STEP] = torch.tensor(state.step)
        dense |= {buffer_key(name): buffer.cpu() for name, buffer in module.named_buffers()}
        files.append(_write(directory / "dense.safetensors", dense))
    if experts:
        files.append(_write(directory / f"experts_{rank:05d}.safetensors", experts))
    files.append(_write(directory / f"random_{rank:05d}.safetensors", _random_state()))
    return files


def _write(path: Path, tensors: dict[str, Tensor]) -> Path:
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)
    return path


def load(directory: Path, module: Decoder, state: OptimizerState) -> None:
    """Restores what :func:`save` wrote, for this rank's share of the present layout.

    Raises:
        UserError: tensors that are missing, surplus or of another shape, by name.
    """
    reader = _Reader([directory / "dense.safetensors", *sorted(directory.glob("experts_*.safetensors"))])
    ranges = _expert_ranges(module)
    expected: set[str] = {OPTIMIZER_STEP}
    for name, parameter in module.named_parameters():
        shape = tuple(parameter.shape)
        values = {}
        for part in (MASTER, *MOMENTS):
            if name not in ranges:
                values[part] = reader.read(parameter_key(name, part), shape)
                expected.add(parameter_key(name, part))
            else:
                local, num_experts = ranges[name]
                values[part] = torch.stack([reader.read(parameter_key(name, part, e), shape[1:]) for e in local])
                expected |= {parameter_key(name, part, e) for e in range(num_experts)}
        state.set(parameter, values)
    for name, buffer in module.named_buffers():
        buffer.copy_(reader.read(buffer_key(name), tuple(buffer.shape)))
        expected.add(buffer_key(name))
    surplus = sorted(reader.names - expected)
    if surplus:
        raise UserError(f"checkpoint {directory}: has tensors that this model lacks, such as {surplus[0]}")
    state.step = int(reader.read(OPTIMIZER_STEP, ()))
    _restore_random_state(directory)


class _Reader:
    """Tensors by name over several safetensors files, read one at a time."""

    def __init__(self, paths: list[Path]) -> None:
        self._files = [safe_open(path, framework="pt") for path in paths]
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


def _random_state() -> dict[str, Tensor]:
    cuda = {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_initialized() else {}
    return {"cpu": torch.get_rng_state(), **cuda}


def _restore_random_state(directory: Path) -> None:
    """This rank's generators; a rank that the saving run did not have keeps its own."""
    path = directory / f"random_{dist.get_rank():05d}.safetensors"
    if not path.exists():
        return
    with safe_open(path, framework="pt") as file:
        torch.set_rng_state(file.get_tensor("cpu"))
        if torch.cuda.is_initialized() and "cuda" in file.keys():  # noqa: SIM118
            torch.cuda.set_rng_state(file.get_tensor("cuda"))
