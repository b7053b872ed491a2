"""Storage and computation of experts under vLLM. This file ships with the weights.

transformers splits experts over ranks by ``base_model_tp_plan``. vLLM uses that plan only for linear layers, and lets a
module that has ``load_weights`` load its own tensors, so the experts split themselves. On a CPU, vLLM's kernel for
experts uses packed weights and is several times as fast as PyTorch's products for few tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from dynmoe.hf.configuration_dynmoe import DynMoEConfig
from dynmoe.ops.opaque import opaque_experts

_TILE = 32  # vLLM's kernel requires widths that are multiples of this


def server_group(config: DynMoEConfig) -> Any:
    """vLLM's tensor-parallel group for the model being built; None outside of vLLM."""
    if config._attn_implementation != "vllm":  # set by vLLM before it builds a model
        return None
    return import_module("vllm.distributed").get_tp_group()


class ExpertsHost:
    """The environment that runs the experts: vLLM, or plain PyTorch."""

    def __init__(self, config: DynMoEConfig) -> None:
        self.group = server_group(config)
        self.width = config.moe_intermediate_size // self.ranks
        if config.moe_intermediate_size % self.ranks:
            problem = f"does not divide moe_intermediate_size={config.moe_intermediate_size}"
            raise ValueError(f"tensor_parallel_size={self.ranks}: {problem}; use a divisor")
        fits = config.hidden_size % _TILE == 0 and self.width % _TILE == 0
        self.packs = self.group is not None and fits and _vllm_computes_on_a_cpu()

    @property
    def ranks(self) -> int:
        """Number of ranks over which the neurons of each expert are split."""
        return 1 if self.group is None else int(self.group.world_size)

    def load(self, experts: nn.Module, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Copies this rank's neurons from a checkpoint's tensors; returns the names of the tensors."""
        rank = 0 if self.group is None else self.group.rank_in_group
        loaded = set()
        for name, whole in weights:
            if name == "down_proj":
                own = whole.chunk(self.ranks, dim=2)[rank]
            else:  # gate and up projection, concatenated
                own = whole.unflatten(1, (2, self.ranks, -1))[:, :, rank].flatten(1, 2)
            own = own.to(getattr(experts, name)).contiguous()
            if self.packs:
                own = _custom_ops().cpu_prepack_moe_weight(own, _instructions(own.dtype))
            getattr(experts, name).data.copy_(own)
            loaded.add(name)
        return loaded

    def compute(
        self, x_TD: Tensor, map_TE: Tensor, gates_TE: Tensor, w_up_EHD: Tensor, w_down_EDF: Tensor, most_experts: int
    ) -> Tensor:
        """Computes the experts' outputs; see ``opaque_experts``."""
        if self.packs:
            y_TD: Tensor = torch.ops.dynmoe.vllm_experts_1(x_TD, map_TE, gates_TE, w_up_EHD, w_down_EDF)
        else:
            y_TD = opaque_experts(x_TD, map_TE, gates_TE, w_up_EHD, w_down_EDF, most_experts)
        return y_TD if self.ranks == 1 else self.group.all_reduce(y_TD)


def _custom_ops() -> Any:
    return import_module("vllm._custom_ops")


def _vllm_computes_on_a_cpu() -> bool:
    platform = import_module("vllm.platforms").current_platform
    return bool(platform.is_cpu()) and hasattr(torch.ops._C, "cpu_fused_moe")


def _instructions(dtype: torch.dtype) -> str:
    """The instruction set that vLLM's kernel uses on this CPU."""
    return "amx" if dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported() else "vec"


def _experts(x_TD: Tensor, map_TE: Tensor, gates_TE: Tensor, w_up_EHD: Tensor, w_down_EDF: Tensor) -> Tensor:
    """Uses vLLM's kernel, which requires a fixed number of experts per token: each route is passed as one token."""
    token_N, expert_N = map_TE.nonzero(as_tuple=True)
    rows_ND = x_TD.new_empty(len(token_N), x_TD.shape[1])
    if len(token_N):
        _custom_ops().cpu_fused_moe(
            rows_ND, x_TD.index_select(0, token_N), w_up_EHD, w_down_EDF, None, None, gates_TE[map_TE][:, None],
            expert_N[:, None].to(torch.int32), "silu", _instructions(x_TD.dtype),
        )  # fmt: skip
    y_TD = torch.zeros_like(x_TD, dtype=torch.float32).index_add_(0, token_N, rows_ND.float())
    return y_TD.to(x_TD.dtype)


if not hasattr(torch.ops.dynmoe, "vllm_experts_1"):
    _NAME = "dynmoe::vllm_experts_1"
    _TENSORS = "Tensor x, Tensor routing_map, Tensor gates, Tensor up, Tensor down"
    torch.library.custom_op(_NAME, _experts, mutates_args=(), schema=f"({_TENSORS}) -> Tensor")
    torch.library.register_fake(_NAME, lambda x, *others: torch.empty_like(x))
