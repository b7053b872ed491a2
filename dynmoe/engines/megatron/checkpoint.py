"""Model and optimizer state of a Megatron run by ``megatron.core.dist_checkpointing``, for any layout."""

from __future__ import annotations

import functools
import gc
import queue
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch import Tensor

from dynmoe.config import Config
from dynmoe.engines import plain_state
from dynmoe.engines.megatron.safe_loading import tensors_only
from dynmoe.engines.megatron.versions import check_readable, in_this_process
from dynmoe.engines.megatron.weights import Weight, weights
from dynmoe.engines.random_state import copy_random_state, restore_random_state
from dynmoe.engines.state_names import MASTER, parameter_key
from dynmoe.errors import UserError, some
from dynmoe.train.engine import Snapshot

if TYPE_CHECKING:
    from dynmoe.engines.megatron.engine import MegatronEngine

_FOLDER = "megatron"


def _sharded(engine: MegatronEngine, loading: bool) -> dict[str, Any]:
    """Which parts of which tensors this rank has, or wants."""
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        # Gathered on the rank that writes, in the host's memory; otherwise on every rank, through the device's.
        "distrib_optim_fully_reshardable_mem_efficient": True,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    state: dict[str, Any] = {
        f"model{number}": model.sharded_state_dict(metadata=metadata) for number, model in enumerate(engine.models)
    }
    for own in state.values():
        own.pop("output_layer._extra_state", None)  # of HybridModel alone, and nothing is in it
    optimizer = engine.optimizer.sharded_state_dict(state, is_loading=loading, metadata=metadata)
    return {**state, "optimizer": optimizer, "step": engine.updates}


@contextmanager
def _older_objects_left_alone() -> Iterator[None]:
    """Megatron collects garbage twice for a snapshot, which takes longer than all else: here only what is new."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class _InProcess(TorchDistSaveShardedStrategy):
    """Megatron's format, written by this process alone.

    Megatron forks writers and keeps a server for their results, which outlive a rank that is killed.
    """

    def async_save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: Path, *strategy: str) -> AsyncRequest:
        filesystem_async._results_queue = queue.Queue()
        request = super().async_save(sharded_state_dict, checkpoint_dir, **in_this_process())
        if request.async_fn is None:  # nothing of this rank's
            return request
        transforms, *_ = request.async_fn.args
        rank, buckets, results = request.async_fn_args
        buckets = [(path, name, (items, _copy(tensors))) for path, name, (items, tensors) in buckets]
        return request._replace(async_fn=functools.partial(_write, transforms, rank, buckets, results))


def _copy(tensors: list[tuple[Any, Tensor]]) -> list[tuple[Any, Tensor]]:
    """In host memory; Megatron leaves tensors of a CPU where they are, to be changed by the next step."""
    return [(item, torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)) for item, tensor in tensors]


def _write(transforms: list[Any], rank: int, buckets: list[Any], results: queue.Queue[Any]) -> None:
    """Writes each bucket to its file."""
    written: queue.Queue[Any] = queue.Queue()
    for number, bucket in enumerate(buckets):
        unfinished: queue.Queue[int] = queue.Queue()
        unfinished.put(number)
        FileSystemWriterAsync.write_preloaded_data(transforms, number, bucket, written, unfinished, use_fsync=True)
    found = dict(written.get() for _ in buckets)
    problem = next((result for result in found.values() if isinstance(result, Exception)), None)
    if problem is not None:
        raise problem
    results.put(found)


@torch.no_grad()
def snapshot(directory: Path, engine: MegatronEngine) -> Snapshot:
    """This rank's share: shards of everything that is spread, and what all ranks have in common on the first."""
    folder = directory / _FOLDER
    if dist.get_rank() == 0:
        folder.mkdir()
    dist.barrier()
    with _older_objects_left_alone():
        state = _sharded(engine, loading=False)
    strategy = _InProcess("torch_dist", 1, thread_count=1)
    request = dist_checkpointing.save(state, folder, strategy, async_sharded_save=True)
    assert request is not None
    write_random_state = copy_random_state(directory)

    def write() -> list[Path]:
        if request.async_fn is not None:
            request.async_fn()
        return [*sorted(folder.glob(f"__{dist.get_rank()}_*")), write_random_state()]

    def finish() -> list[Path]:
        for function in request.finalize_fns:
            function()
        if dist.get_rank() != 0:
            return []
        return sorted(path for path in folder.iterdir() if not path.name.startswith("__"))

    return Snapshot(write, finish)


def load(directory: Path, engine: MegatronEngine) -> None:
    """Restores what :func:`snapshot` wrote, for this rank's share of the present layout.

    Raises:
        UserError: tensors that are missing, surplus or of another shape, by name.
    """
    folder = directory / _FOLDER
    check_readable(folder)
    wanted = _sharded(engine, loading=True)
    with tensors_only(folder):
        _check(folder, wanted)
        state = dist_checkpointing.load(wanted, folder)
    for number, model in enumerate(engine.models):
        model.load_state_dict(state[f"model{number}"])
    _load_optimizer(engine, state["optimizer"])
    _set_updates(engine, state["step"])
    restore_random_state(directory)


def _set_updates(engine: MegatronEngine, count: int) -> None:
    engine.step = engine.updates = count
    engine.state.set_step(count)


def _load_optimizer(engine: MegatronEngine, state: Any) -> None:
    """Masters and moments; settings such as the weight decay stay those of the configuration."""
    groups = engine.optimizer.param_groups
    settings = [{name: value for name, value in group.items() if name != "params"} for group in groups]
    engine.optimizer.load_state_dict(state)
    for group, own in zip(engine.optimizer.param_groups, settings, strict=True):
        group.update(own)
    engine.synchronize_parameters()  # where they are their own masters, each rank has its shard of them only


def _check(folder: Path, wanted: dict[str, Any]) -> None:
    """Compares the tensors of a checkpoint with those of all ranks, by name and shape."""
    shapes: dict[str, tuple[int, ...]] = {}
    for value in nested_values(wanted):
        for part in _parts(value):
            shapes[part.key] = tuple(part.global_shape)
    gathered: list[dict[str, tuple[int, ...]]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, shapes)
    model = {key: shape for part in gathered for key, shape in part.items()}
    saved = {
        key: tuple(tensor.global_shape) for key, tensor in dist_checkpointing.load_tensors_metadata(folder).items()
    }
    for key, shape in sorted(model.items()):
        if key not in saved:
            raise UserError(f"checkpoint: tensor {key} is missing; resume with the configuration that made it")
        if saved[key] != shape:
            raise UserError(f"checkpoint: tensor {key} has shape {saved[key]}, this model wants {shape}")
    surplus = sorted(saved.keys() - model.keys())
    if surplus:
        raise UserError(f"checkpoint {folder}: has tensors that this model lacks: {some(surplus)}")


def _parts(value: Any) -> list[ShardedTensor]:
    if isinstance(value, ShardedTensorFactory):
        return [part for built in nested_values([value.build()]) for part in _parts(built)]
    return [value] if isinstance(value, ShardedTensor) else []


def to_plain(config: Config, source: Path, target: Path) -> None:
    """Writes the state of a Megatron checkpoint in the plain model's names and layout, in one process.

    Args:
        config: of the run, with every parallel size 1.
        source: directory of the checkpoint.
        target: directory to write into.
    """
    with tensors_only(source / _FOLDER):
        found = dist_checkpointing.load_tensors_metadata(source / _FOLDER)
    engine = _engine(config, found["embedding.word_embeddings.weight"].global_shape[0])
    load(source, engine)
    plain_state.copy(target, _entries(engine), _buffers(engine), engine.updates)()


def from_plain(config: Config, source: Path, target: Path) -> None:
    """The way back of :func:`to_plain`."""
    engine = _engine(config, plain_state.read_tensor(source, parameter_key("w_embed_VD", MASTER)).shape[0])
    _set_updates(engine, plain_state.load(source, _entries(engine), _buffers(engine)))
    made = snapshot(target, engine)
    made.write()
    made.finish()


def _engine(config: Config, vocab_size: int) -> MegatronEngine:
    from dynmoe.engines.megatron.engine import MegatronEngine  # which imports this module

    return MegatronEngine(config, vocab_size)


def _entries(engine: MegatronEngine) -> list[plain_state.Entry]:
    """Every parameter, in a process that holds all of each."""
    ranges = plain_state.expert_ranges(engine.layers)
    return [_entry(weight, engine, ranges) for model in engine.models for weight in weights(model, engine.config.model)]


def _entry(weight: Weight, engine: MegatronEngine, ranges: dict[int, tuple[range, int]]) -> plain_state.Entry:
    parameter, layout = weight.parameter, weight.layout

    def get() -> dict[str, Tensor]:
        parts, _ = engine.state.shard(parameter)
        return {part: layout.join([flat.view(parameter.shape)]) for part, flat in parts.items()}

    def put(values: dict[str, Tensor]) -> None:
        engine.state.set(parameter, {part: layout.split(plain, 1)[0] for part, plain in values.items()})

    return plain_state.entry(weight.name, parameter, ranges, get, put)


def _buffers(engine: MegatronEngine) -> dict[str, Tensor]:
    """State of the routers under its names in the plain model."""
    return {
        f"layers.{layer.layer}.moe.{name}": buffer for layer in engine.layers for name, buffer in layer.named_buffers()
    }
