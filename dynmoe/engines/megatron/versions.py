"""Megatron-Core 0.16 to 0.19: an adapter for each difference, chosen by what is there, not by a version's number."""

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
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import DistributedOptimizer
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


def decoder(
    config: TransformerConfig,
    layer_spec: Callable[[int], ModuleSpec],
    norm: type,
    vp_stage: int | None,
    **settings: Any,
) -> MegatronModule:
    """The part of a decoder that this rank holds.

    A HybridModel where there is one (0.18): GPTModel gets nothing but repairs from 0.19 on.

    Args:
        config: Megatron's.
        layer_spec: the spec of a layer, by its index in the whole decoder.
        norm: class of the norm behind the last layer.
        vp_stage: of an interleaved pipeline.
        settings: arguments that both models have.
    """
    if importlib.util.find_spec("megatron.core.models.hybrid"):
        from dynmoe.engines.megatron.hybrid import hybrid_model

        return hybrid_model(config, layer_spec, norm, vp_stage=vp_stage, **settings)
    first = get_transformer_layer_offset(config, vp_stage)
    specs = [layer_spec(first + own) for own in range(get_num_layers_to_build(config, vp_stage))]
    block = TransformerBlockSubmodules(layer_specs=specs, layer_norm=norm)
    return GPTModel(config, block, vp_stage=vp_stage, **settings)


def final_norm(block: nn.Module) -> Any:
    """Behind the last layer, by its name in a HybridModel (0.18) or in a GPTModel."""
    return block.final_norm if hasattr(block, "final_norm") else block.final_layernorm


def distribute(
    config: TransformerConfig, ddp: DistributedDataParallelConfig, part: nn.Module, disable_bucketing: bool
) -> DistributedDataParallel:
    """A part of the model with its gradients in buffers, of which each data-parallel rank reduces a share.

    From 0.18 on callers give the layout of the buffers (and are told so where they do not).
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
    return DistributedDataParallel(config, ddp, part, disable_bucketing=disable_bucketing, **settings)


def in_this_process() -> dict[str, str]:
    """Arguments for ``async_save`` that leave the writing to this process.

    0.17 has a choice, whose default needs nvidia-resiliency-ext and a process of its own.
    """
    known = inspect.signature(TorchDistSaveShardedStrategy.async_save).parameters
    return {"async_strategy": "mcore"} if "async_strategy" in known else {}


def check_readable(folder: Path) -> None:
    """Refuses a checkpoint of 0.19 or later where Megatron is older: what all ranks share lies elsewhere in it."""
    knows_both = hasattr(serialization, "_legacy_common_state_exists")
    if not (knows_both or (folder / COMMON_STATE_FNAME).exists()):
        problem = f"has no {COMMON_STATE_FNAME}: Megatron-Core 0.19 or later wrote it, which this version cannot read"
        cure = "install that, or convert the run where it is installed (python -m dynmoe.convert)"
        raise UserError(f"checkpoint {folder}: {problem}; {cure}")


def with_router(layer: ModuleSpec, router: Callable[..., nn.Module]) -> ModuleSpec | None:
    """A copy of a layer's spec in which Megatron's MoE layer has another router; None where it has no such layer."""
    mlp = layer.submodules.mlp
    if isinstance(mlp, ModuleSpec) and mlp.module is MoELayer:
        mlp = dataclasses.replace(mlp, submodules=dataclasses.replace(mlp.submodules, router=router))
    elif isinstance(mlp, functools.partial) and mlp.func is MoELayer:  # from 0.18 on
        parts = dataclasses.replace(mlp.keywords["submodules"], router=router)
        mlp = functools.partial(mlp.func, *mlp.args, **mlp.keywords | {"submodules": parts})
    else:
        return None
    module = _counting_rows(layer.module) if _sends_a_fixed_number() else layer.module
    return dataclasses.replace(layer, module=module, submodules=dataclasses.replace(layer.submodules, mlp=mlp))


def captured(config: TransformerConfig) -> set[str]:
    """Names of what CUDA graphs hold of each layer, "layer" where that is all of it."""
    parts = getattr(config, "cuda_graph_modules", None) or getattr(
        config, "cuda_graph_scope", None
    )  # from 0.18; before
    return {part.name for part in parts or []} or {"layer"}


def is_traced() -> bool:
    """Whether Megatron writes down routing decisions, which it can from 0.19 on."""
    if not importlib.util.find_spec("megatron.core.transformer.moe.router_trace"):
        return False
    from megatron.core.transformer.moe.router_trace import get_moe_router_tracer

    return get_moe_router_tracer() is not None


def _sends_a_fixed_number() -> bool:
    """Whether what Megatron permutes has the number of rows that it is told (0.17), not that of the map (0.16)."""
    rows, *_ = permute(torch.zeros(2, 1), torch.tensor([[True], [False]]), num_out_tokens=2)
    return len(rows) == 2


class _CountedRows(MoEAlltoAllTokenDispatcher):
    """Permutes as many rows as the map has.

    The stock one takes ``moe_router_topk`` for each token: of more it would lose some, fewer it would fill up with rows
    that no expert expects.
    """

    def preprocess(self, routing_map: Tensor) -> Tensor:
        rows_of_local_experts = super().preprocess(routing_map)
        self.num_out_tokens = routing_map.sum()
        self._maybe_update_cuda_sync_point("before_permutation_1")
        return rows_of_local_experts


@functools.cache
def _counting_rows(layer: type) -> type:
    """A kind of layer whose all-to-all dispatcher counts its rows."""

    class CountingLayer(layer):  # type: ignore[valid-type, misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            if type(self.mlp.token_dispatcher) is MoEAlltoAllTokenDispatcher:
                self.mlp.token_dispatcher.__class__ = _CountedRows

    return CountingLayer
