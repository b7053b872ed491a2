"""ZeRO 3: each rank keeps a part of every parameter, and layers gather what they need.

Experts are spread over the expert-parallel ranks as always, and ZeRO partitions each over the ranks that have the same
experts. DeepSpeed refuses its own MoE layers there, so ours does not pretend to be one; it carries the marks that
DeepSpeed's AutoEP sets on experts instead.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.runtime.zero.partition_parameters import GatheredParameters, ZeroParamStatus
from deepspeed.utils import (
    groups,
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from dynmoe.config import ModelConfig
from dynmoe.engines.deepspeed_state import OptimizerState
from dynmoe.engines.state_names import MASTER, MOMENTS
from dynmoe.moe import MoEContext, MoELayer


class PartitionedMoELayer(MoELayer):
    """Our layer, whose experts ZeRO 3 partitions over the ranks that have the same ones."""

    def __init__(self, model: ModelConfig, layer: int, seed: int, context: MoEContext) -> None:
        super().__init__(model, layer, seed, context)
        name = f"ep_size_{context.groups.expert_parallel}"
        for parameter in self.experts.parameters():
            marks = {
                "group_name": name,
                "ds_zero_placement_family": "autoep_expert",
                "ds_zero_partition_group_name": name,
                "ds_zero_partition_process_group": groups._get_expert_data_parallel_group(name),
            }
            for mark, value in marks.items():
                setattr(parameter, mark, value)


class PartitionedState(OptimizerState):
    """fp32 masters and moments of whole parameters under ZeRO 3; reading is collective."""

    def __init__(self, optimizer: Any, adam: torch.optim.AdamW) -> None:
        super().__init__(optimizer, adam)
        for partition in optimizer.fp32_partitioned_groups_flat:
            self._start(partition, MOMENTS)

    def shape(self, parameter: nn.Parameter) -> tuple[int, ...]:
        return tuple(parameter.ds_shape)  # type: ignore[attr-defined]

    def get(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        moments = {name: safe_get_full_optimizer_state(parameter, name) for name in MOMENTS}
        return {MASTER: safe_get_full_fp32_param(parameter), **moments}

    def whole(self, module: nn.Module) -> AbstractContextManager[None]:
        return GatheredParameters(list(module.parameters()))

    @torch.no_grad()
    def set(self, parameter: Any, values: dict[str, Tensor]) -> None:
        # DeepSpeed's functions for whole tensors fail if the ranks do not divide the number of elements.
        own = {name: self._partition(parameter, value) for name, value in values.items()}
        safe_set_local_fp32_param(parameter, own[MASTER])
        for name in MOMENTS:
            safe_set_local_optimizer_state(parameter, own[name], name)
        parameter.ds_tensor.copy_(own[MASTER])
        if parameter.ds_status == ZeroParamStatus.AVAILABLE:  # DeepSpeed leaves small parameters whole
            parameter.data.copy_(values[MASTER])

    def _partition(self, parameter: Any, value: Tensor) -> Tensor:
        """This rank's part of a whole tensor, with padding."""
        size = parameter.ds_tensor.numel()
        start = dist.get_rank(parameter.ds_process_group) * size
        part = value.flatten()[start : start + size].to(parameter.ds_tensor.device)
        return F.pad(part, (0, size - part.numel()))
