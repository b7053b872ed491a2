"""Adapters for Megatron-Core 0.16 to 0.19, chosen by feature detection instead of version numbers."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.strategies import common as strategies_common
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.extensions import transformer_engine
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import DistributedOptimizer
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import permute
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor, nn

from dynmoe.errors import UserError

# 0.16 builds latent attention as if Transformer Engine were installed, and fails where it is not.
multi_latent_attention.HAVE_TE = transformer_engine.HAVE_TE


def build_decoder(
    config: TransformerConfig,
    layer_spec: Callable[[int], ModuleSpec],
    norm: type,
    vp_stage: int | None,
    **settings: Any,
) -> MegatronModule:
    """Builds a model chunk of this rank.

    A HybridModel where it exists (0.18), as GPTModel receives only bug fixes from 0.19 on.

    Args:
        config: Megatron's configuration.
        layer_spec: returns the spec of a layer, given its index in the whole decoder.
        norm: class of the final norm.
        vp_stage: virtual pipeline stage of the chunk; None without an interleaved schedule.
        settings: arguments that both model classes take.
    """
    if importlib.util.find_spec("megatron.core.models.hybrid"):
        from dynmoe.engines.megatron.hybrid import hybrid_model

        return hybrid_model(config, layer_spec, norm, vp_stage=vp_stage, **settings)
    first = get_transformer_layer_offset(config, vp_stage)
    specs = [layer_spec(first + offset) for offset in range(get_num_layers_to_build(config, vp_stage))]
    block = TransformerBlockSubmodules(layer_specs=specs, layer_norm=norm)
    return GPTModel(config, block, vp_stage=vp_stage, **settings)


def final_norm(block: nn.Module) -> Any:
    """The norm after the last layer of a HybridModel (0.18) or GPTModel."""
    return block.final_norm if hasattr(block, "final_norm") else block.final_layernorm


def wrap_with_ddp(
    config: TransformerConfig, ddp: DistributedDataParallelConfig, part: nn.Module, disable_bucketing: bool
) -> DistributedDataParallel:
    """Wraps a model chunk in Megatron's DDP with gradient buffers sharded over data-parallel ranks.

    From 0.18 on Megatron warns unless the caller passes the layout of the buffers.
    """
    settings = {}
    if hasattr(DistributedOptimizer, "compute_full_param_layout"):
        is_first = parallel_state.is_pipeline_first_stage(ignore_virtual=True)
        settings["full_param_layout"] = DistributedOptimizer.compute_full_param_layout(
            [parameter for parameter in part.parameters() if parameter.requires_grad],
            ddp.bucket_size if is_first and not disable_bucketing else None,
            parallel_state.get_data_parallel_world_size(with_context_parallel=True),
            ddp,
            expert_data_parallel_world_size=parallel_state.get_expert_data_parallel_world_size(),
        )
    wrapped = DistributedDataParallel(config, ddp, part, disable_bucketing=disable_bucketing, **settings)
    for buffer in (*wrapped.buffers, *wrapped.expert_parallel_buffers):
        _keep_padding(buffer)
    return wrapped


def _keep_padding(buffer: Any) -> None:
    """Lets a snapshot of the optimizer's state keep the padding between the buckets of a buffer.

    Megatron leaves it out and then looks for each parameter where it is with the padding, so parameters after the
    first bucket get the state of others. Only a shared embedding makes buckets (a known issue in its source).
    """
    buffer.numel_unpadded = buffer.numel
    for bucket in buffer.buckets:
        bucket.numel_unpadded = bucket.grad_data.numel()


def in_process_save_options() -> dict[str, str]:
    """Arguments with which ``async_save`` writes in this process.

    The default of 0.17 needs nvidia-resiliency-ext and a separate process.
    """
    parameters = inspect.signature(TorchDistSaveShardedStrategy.async_save).parameters
    return {"async_strategy": "mcore"} if "async_strategy" in parameters else {}


def writes_of_rank_0() -> list[tuple[Any, str]]:
    """Functions with which rank 0 alone writes small files between collectives: owner and name."""
    common = []  # from 0.19 on it is in the shards
    if hasattr(serialization, "save_common"):
        common = [(serialization, "save_common")]
    elif hasattr(strategies_common, "TorchCommonSaveStrategy"):
        common = [(strategies_common.TorchCommonSaveStrategy, "save_common")]
    return [*common, (FileSystemWriterAsync, "finish"), (serialization, "save_config")]


def check_readable(folder: Path) -> None:
    """Refuses a checkpoint of 0.19 or later under an older Megatron: the state common to all ranks has moved."""
    reads_both = hasattr(serialization, "_legacy_common_state_exists")
    if not (reads_both or (folder / COMMON_STATE_FNAME).exists()):
        problem = f"has no {COMMON_STATE_FNAME}: Megatron-Core 0.19 or later wrote it, and this version cannot read it"
        fix = "install that version, or convert the run where it is installed (python -m dynmoe.convert)"
        raise UserError(f"checkpoint {folder}: {problem}; {fix}")


def with_router(layer: ModuleSpec, router: Callable[..., nn.Module]) -> ModuleSpec | None:
    """Returns a copy of a layer spec whose MoE layer has the given router; None if it has no Megatron MoE layer."""
    mlp = layer.submodules.mlp
    if isinstance(mlp, ModuleSpec) and mlp.module is MoELayer:
        mlp = dataclasses.replace(mlp, submodules=dataclasses.replace(mlp.submodules, router=router))
    elif isinstance(mlp, functools.partial) and mlp.func is MoELayer:  # from 0.18 on
        parts = dataclasses.replace(mlp.keywords["submodules"], router=router)
        mlp = functools.partial(mlp.func, *mlp.args, **mlp.keywords | {"submodules": parts})
    else:
        return None
    module = _with_variable_rows(layer.module) if _permute_has_fixed_rows() else layer.module
    return dataclasses.replace(layer, module=module, submodules=dataclasses.replace(layer.submodules, mlp=mlp))


def captured_modules(config: TransformerConfig) -> set[str]:
    """Names of the modules of each layer that CUDA graphs capture; "layer" if they capture all of it."""
    modules = getattr(config, "cuda_graph_modules", None)  # from 0.18 on
    modules = modules or getattr(config, "cuda_graph_scope", None) or []
    return {module.name for module in modules} or {"layer"}


def is_router_traced() -> bool:
    """True if Megatron traces routing decisions, which it supports from 0.19 on."""
    if not importlib.util.find_spec("megatron.core.transformer.moe.router_trace"):
        return False
    from megatron.core.transformer.moe.router_trace import get_moe_router_tracer

    return get_moe_router_tracer() is not None


def _permute_has_fixed_rows() -> bool:
    """True if ``permute`` returns ``num_out_tokens`` rows (0.17) instead of one row per route in the map (0.16)."""
    rows, *_ = permute(torch.zeros(2, 1), torch.tensor([[True], [False]]), num_out_tokens=2)
    return len(rows) == 2


class _VariableRowsDispatcher(MoEAlltoAllTokenDispatcher):
    """Permutes one row per route in the routing map.

    The stock dispatcher assumes ``moe_router_topk`` rows per token. It would lose rows beyond that, and fill missing
    ones with rows that no expert expects.
    """

    def preprocess(self, routing_map: Tensor) -> Tensor:
        rows_per_local_expert = super().preprocess(routing_map)
        self.num_out_tokens = routing_map.sum()
        self._maybe_update_cuda_sync_point("before_permutation_1")
        return rows_per_local_expert


@functools.cache
def _with_variable_rows(layer: type) -> type:
    """Subclasses a layer so that its all-to-all dispatcher handles any number of routes."""

    class VariableRowsLayer(layer):  # type: ignore[valid-type, misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            if type(self.mlp.token_dispatcher) is MoEAlltoAllTokenDispatcher:
                self.mlp.token_dispatcher.__class__ = _VariableRowsDispatcher

    return VariableRowsLayer
