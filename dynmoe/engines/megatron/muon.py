"""Muon over the parts of matrices that Megatron's distributed optimizer holds."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer import ChainedOptimizer, DistributedOptimizer
from megatron.core.transformer.module import MegatronModule

from dynmoe.config import Config
from dynmoe.engines.megatron.weights import Weight, weights
from dynmoe.engines.whole_matrices import MatrixExchange, Part, Place, Unit, held_by_unit
from dynmoe.model.matrices import rows_of_matrices
from dynmoe.train.muon import MuonAdamW


def connect(
    config: Config, models: Sequence[MegatronModule], optimizer: ChainedOptimizer, muon: frozenset[int]
) -> None:
    """Lets Muon orthogonalize whole matrices of the plain model; collective.

    Args:
        config: of the run.
        models: model chunks of this rank.
        optimizer: over their parameters.
        muon: parameters that Muon updates, by ``id``.
    """
    matrices = [weight for model in models for weight in weights(model, config.model) if id(weight.parameter) in muon]
    for part in optimizer.chained_optimizers:
        if part.is_stub_optimizer or not isinstance(part.optimizer, MuonAdamW):
            continue
        for group in part.optimizer.param_groups:
            if group["muon"]:
                own = [weight for weight in matrices if _is_expert(weight) == group["is_expert_parallel"]]
                part.optimizer.orthogonalize[group["number"]] = _exchange(
                    config, part, own, group["is_expert_parallel"]
                )


def _is_expert(weight: Weight) -> bool:
    return not getattr(weight.parameter, "allreduce", True)


def _exchange(config: Config, part: DistributedOptimizer, matrices: list[Weight], experts: bool) -> MatrixExchange:
    units: list[Unit] = []
    held: list[tuple[Part, Place]] = []
    for weight in matrices:
        parameter = weight.parameter
        unit = _unit(config, weight)
        if parameter in part.model_param_group_index_map:
            _, order = part.model_param_group_index_map[parameter]
            own = part._get_model_param_range_map(parameter)["param"]
            shard = parallel_state.get_tensor_model_parallel_rank() if unit.shards > 1 else 0
            held += held_by_unit(len(units), unit.size, shard, own.start, own.size, Place(order, 0))
        units += [unit] * (len(parameter) if experts else 1)
    ranks = (
        parallel_state.get_expert_data_parallel_group()
        if experts
        else parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    )
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    return MatrixExchange(units, held, ranks if dist.get_world_size(ranks) > 1 else None, dtype, device)


def _unit(config: Config, weight: Weight) -> Unit:
    """The unit of a parameter, or of each of its experts."""
    shape = weight.parameter.shape[-2:]
    tensor = config.parallel.tensor
    if weight.layout.replicated or tensor == 1:
        tensor = 1
    whole = weight.layout.join([torch.empty(shape, device="meta")] * tensor)
    rows = rows_of_matrices(config.model, weight.name, len(whole))
    return Unit(tuple(shape), tensor, weight.layout.join, functools.partial(_split, weight, tensor), rows)


def _split(weight: Weight, shards: int, whole: torch.Tensor) -> list[torch.Tensor]:
    return weight.layout.split(whole, shards)
