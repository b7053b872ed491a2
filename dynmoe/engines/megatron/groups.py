"""Process groups of a Megatron parallel layout."""

from __future__ import annotations

import logging
import os
import warnings

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from dynmoe.config import Config
from dynmoe.config.parallel import ParallelConfig
from dynmoe.engines.device import check_backend, take_gpu
from dynmoe.engines.patience import PATIENCE, be_patient
from dynmoe.launched import choose_interface
from dynmoe.moe import MoEContext, MoEGroups


def start_processes(config: Config | None = None) -> torch.device:
    """Joins the launcher's process group, or creates one with a single rank; returns this rank's device.

    Raises:
        ConfigError: see :func:`check_backend`.
    """
    choose_interface()
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # Megatron warns about our MoE layer in every layer, and about in-process writing in every save.
    strategies = "dist_checkpointing.strategies"
    for name in ("transformer.transformer_layer", f"{strategies}.torch", f"{strategies}.common"):
        logging.getLogger(f"megatron.core.{name}").setLevel(logging.ERROR)
    cuda = torch.cuda.is_available()
    device = take_gpu() if cuda else torch.device("cpu")
    check_backend(config, device)
    if not dist.is_initialized():
        backend = "nccl" if cuda else "gloo"
        if "RANK" in os.environ:
            dist.init_process_group(backend, timeout=PATIENCE)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=PATIENCE)
    return device


def make_groups(parallel: ParallelConfig, seed: int) -> None:
    """Creates Megatron's process groups, or reuses those of an earlier engine with the same layout."""
    if not (parallel_state.model_parallel_is_initialized() and _current_layout() == parallel):
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor,
            pipeline_model_parallel_size=parallel.pipeline,
            virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
            context_parallel_size=parallel.context,
            expert_model_parallel_size=parallel.expert,
            expert_tensor_parallel_size=1,  # see model.transformer_config
        )
        be_patient()
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def _current_layout() -> ParallelConfig:
    return ParallelConfig(
        tensor=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline=parallel_state.get_pipeline_model_parallel_world_size(),
        virtual_pipeline=parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1,
        context=parallel_state.get_context_parallel_world_size(),
        expert=parallel_state.get_expert_model_parallel_world_size(),
    )


def _none_if_single(group: dist.ProcessGroup) -> dist.ProcessGroup | None:
    return group if dist.get_world_size(group) > 1 else None


def make_context(backend: str) -> MoEContext:
    """Process groups of the MoE layers. Tensor-parallel ranks hold different tokens (sequence parallelism)."""
    groups = MoEGroups(
        expert=_none_if_single(parallel_state.get_expert_model_parallel_group()),
        tokens=_none_if_single(parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)),
        sequence=_none_if_single(parallel_state.get_tensor_and_context_parallel_group()),
        pipeline=_none_if_single(parallel_state.get_pipeline_model_parallel_group()),
    )
    return MoEContext(groups, backend)


def context_positions(length: int, ranks: int, rank: int) -> torch.Tensor:
    """Positions of a sequence on a context-parallel rank: consecutive ones, as each rank attends with other heads."""
    return torch.arange(length).chunk(ranks)[rank]
