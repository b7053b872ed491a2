"""Model and optimizer state of a DeepSpeed run in its checkpoints."""

from __future__ import annotations

import functools
from collections.abc import Set
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch import Tensor, nn

from dynmoe.engines import canonical_state
from dynmoe.engines.random_state import copy_random_state, restore_random_state
from dynmoe.engines.state_names import MASTER, MOMENTS, MOMENTS_OF_MUON
from dynmoe.model import Decoder
from dynmoe.moe import MoEContext
from dynmoe.train.engine import Snapshot


@dataclass(frozen=True)
class Held:
    """Consecutive elements of a flattened parameter, and the offset of the first in the tensor of the optimizer."""

    start: int
    length: int
    offset: int


class OptimizerState:
    """fp32 masters and moments of whole parameters, for any DeepSpeed optimizer.

    Reading is collective under ZeRO. The moments are created as zeros before the first step.

    Args:
        optimizer: DeepSpeed's.
        adam: the optimizer within it, over groups of :func:`dynmoe.train.optimizer.parameter_groups`.
        muon: parameters that Muon updates, by ``id``.

    Attributes:
        partitioned: whether the optimizer has one tensor for each parameter group, of which ranks hold a part each.
    """

    def __init__(self, optimizer: Any, adam: torch.optim.AdamW, muon: Set[int] = frozenset()) -> None:
        self._adam = adam
        self._optimizer = optimizer
        self._muon = muon
        self.partitioned = isinstance(optimizer, (DeepSpeedZeroOptimizer, BF16_Optimizer))
        self._masters: dict[int, Tensor] = {}
        if isinstance(optimizer, FP16_UnfusedOptimizer):  # bf16 without ZeRO
            pairs = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
            self._masters = {id(p): master for low, high in pairs for p, master in zip(low, high, strict=True)}
        for group in adam.param_groups:
            for tensor in group["params"]:  # whole, or DeepSpeed's partition of a group
                self._start(tensor, MOMENTS_OF_MUON if group["muon"] else MOMENTS)
        if self.partitioned:
            # DeepSpeed links moments to parameters after the first step of the first group, when the other groups
            # have no moments yet. Linking them here includes all groups.
            optimizer._hp_optimizer_states_linked = False
            optimizer._lazy_init_hp_params_optimizer_state()

    def _start(self, tensor: Tensor, moments: tuple[str, ...]) -> None:
        """Sets the state of a tensor of the optimizer to that before the first step."""
        self._adam.state[tensor] = {
            "step": torch.zeros((), dtype=torch.float32, device=tensor.device),
            **{name: torch.zeros_like(tensor) for name in moments},
        }

    @property
    def step(self) -> int:
        """Number of optimizer steps taken."""
        return int(next(iter(self._adam.state.values()))["step"].item())

    @step.setter
    def step(self, value: int) -> None:
        for state in self._adam.state.values():
            state["step"].fill_(value)

    def moments(self, parameter: nn.Parameter) -> tuple[str, ...]:
        """Names of the moments of a parameter."""
        return MOMENTS_OF_MUON if id(parameter) in self._muon else MOMENTS

    def shape(self, parameter: nn.Parameter) -> tuple[int, ...]:
        """Shape of the whole parameter."""
        return tuple(parameter.shape)

    def get(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """fp32 master and moments of the whole parameter, on its device."""
        names = self.moments(parameter)
        if self.partitioned:
            moments = {name: safe_get_full_optimizer_state(parameter, name) for name in names}
            return {MASTER: safe_get_full_fp32_param(parameter), **moments}
        master = self._masters.get(id(parameter), parameter)
        return {MASTER: master.detach(), **{name: self._adam.state[master][name] for name in names}}

    def held(self, parameter: nn.Parameter) -> Held | None:
        """The elements of a parameter that this rank updates; None if there are none."""
        if not self.partitioned:
            return Held(0, parameter.numel(), 0)
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return None
        own = mapping.lp_fragment_address
        return Held(own.start, own.numel, mapping.hp_fragment_address.start)

    def whole(self, module: nn.Module) -> AbstractContextManager[None]:
        """See :class:`dynmoe.moe.adaptation.ParameterReset`; parameters always are whole, or this rank's shards."""
        return nullcontext()

    @torch.no_grad()
    def reset_slice(self, parameter: nn.Parameter, index: tuple[int | slice, ...], fresh: Tensor | None) -> None:
        """See :class:`dynmoe.moe.adaptation.ParameterReset`."""
        values = {part: value.clone() for part, value in self.get(parameter).items()}
        for part, value in values.items():
            if part != MASTER:
                value[index] = 0.0
            elif fresh is not None:
                value[index] = fresh
        self.set(parameter, values)

    @torch.no_grad()
    def set(self, parameter: nn.Parameter, values: dict[str, Tensor]) -> None:
        """Sets master and moments of a whole parameter, and the parameter itself."""
        parameter.copy_(values[MASTER])
        if self.partitioned:
            safe_set_full_fp32_param(parameter, values[MASTER].to(parameter.device))
            for name in self.moments(parameter):
                safe_set_full_optimizer_state(parameter, values[name].to(parameter.device), name)
            return
        master = self._masters.get(id(parameter), parameter)
        master.copy_(values[MASTER])
        for name in self.moments(parameter):
            self._adam.state[master][name].copy_(values[name])


def _entries(module: Decoder, state: OptimizerState) -> list[canonical_state.Entry]:
    ranges = canonical_state.expert_ranges(module.moe_layers)
    return [
        canonical_state.entry(
            name,
            p,
            state.shape(p),
            ranges,
            state.moments(p),
            functools.partial(state.get, p),
            functools.partial(state.set, p),
        )
        for name, p in module.named_parameters()
    ]


def snapshot(directory: Path, module: Decoder, state: OptimizerState, context: MoEContext) -> Snapshot:
    """Copies this rank's share: rank 0 writes the dense state, and one replica of each expert is written."""
    rank = dist.get_rank()
    # Consecutive ranks form an expert-parallel group: the first of them holds one replica of every expert.
    writes_experts = rank < context.groups.expert_parallel
    entries = _entries(module, state)
    buffers = dict(module.named_buffers())
    write_state = canonical_state.copy(directory, entries, buffers, state.step, rank == 0, writes_experts)
    write_random_state = copy_random_state(directory)
    return Snapshot(lambda: [*write_state(), write_random_state()])


def load(directory: Path, module: Decoder, state: OptimizerState) -> None:
    """Restores this rank's share, under the current layout, of what :func:`snapshot` wrote.

    Raises:
        UserError: names tensors that are missing, unexpected or of another shape.
    """
    state.step = canonical_state.load(directory, _entries(module, state), dict(module.named_buffers()))
    restore_random_state(directory)
