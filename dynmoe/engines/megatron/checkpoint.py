"""Saves and loads model and optimizer through ``megatron.core.dist_checkpointing``, under any layout."""

from __future__ import annotations

import functools
import gc
import queue
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from dynmoe.engines.megatron.optimizer import count_steps_of_nothing
from dynmoe.engines.megatron.safe_loading import tensors_only
from dynmoe.engines.megatron.versions import check_readable, in_process_save_options, writes_of_rank_0
from dynmoe.engines.random_state import copy_random_state, restore_random_state
from dynmoe.errors import UserError, some
from dynmoe.train.engine import Snapshot

_FOLDER = "megatron"
_FIX = "resume with the configuration that saved it"


def _sharded_state_dict(
    models: Sequence[MegatronModule], optimizer: ChainedOptimizer, step: int, is_loading: bool
) -> dict[str, Any]:
    """This rank's shards, to save or to load into."""
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        # Gathers in host memory, on the writing rank only; the default gathers in device memory, on every rank.
        "distrib_optim_fully_reshardable_mem_efficient": True,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    state: dict[str, Any] = {
        f"model{number}": model.sharded_state_dict(metadata=metadata) for number, model in enumerate(models)
    }
    for model_state in state.values():
        model_state.pop("output_layer._extra_state", None)  # only HybridModel has this entry, and it is empty
    optimizer_state = optimizer.sharded_state_dict(state, is_loading=is_loading, metadata=metadata)
    if not is_loading:
        parts = [optimizer_state] if "optimizer" in optimizer_state else optimizer_state.values()
        for part in parts:
            if part.get("param_state", 0) is None:  # another rank gathered it; Megatron would report a difference
                del part["param_state"]
    return {**state, "optimizer": optimizer_state, "step": step}


@contextmanager
def _existing_objects_frozen() -> Iterator[None]:
    """Keeps Megatron's two garbage collections per snapshot short: without this they take longer than all the rest."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class _InProcessSaveStrategy(TorchDistSaveShardedStrategy):
    """Megatron's checkpoint format, written by this process alone.

    Megatron forks writers and keeps a server for their results; both would outlive a killed rank.
    """

    def async_save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: Path, *strategy: str) -> AsyncRequest:
        filesystem_async._results_queue = queue.Queue()
        request = super().async_save(sharded_state_dict, checkpoint_dir, **in_process_save_options())
        if request.async_fn is None:  # this rank has nothing to write
            return request
        transforms, *_ = request.async_fn.args
        rank, buckets, results = request.async_fn_args
        buckets = [(path, name, (items, _copy_to_host(tensors))) for path, name, (items, tensors) in buckets]
        return request._replace(async_fn=functools.partial(_write, transforms, rank, buckets, results))


def _copy_to_host(tensors: list[tuple[Any, Tensor]]) -> list[tuple[Any, Tensor]]:
    """Copies CPU tensors too: Megatron would write those in place, while the next step changes them."""
    return [(item, torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)) for item, tensor in tensors]


def _write(transforms: list[Any], rank: int, buckets: list[Any], results: queue.Queue[Any]) -> None:
    """Writes each bucket to its file."""
    written: queue.Queue[Any] = queue.Queue()
    for number, bucket in enumerate(buckets):
        unfinished: queue.Queue[int] = queue.Queue()
        unfinished.put(number)
        FileSystemWriterAsync.write_preloaded_data(transforms, number, bucket, written, unfinished, use_fsync=True)
    by_bucket = dict(written.get() for _ in buckets)
    error = next((result for result in by_bucket.values() if isinstance(result, Exception)), None)
    if error is not None:
        raise error
    results.put(by_bucket)


@contextmanager
def _errors_kept() -> Iterator[list[Exception]]:
    """Keeps errors of what rank 0 alone writes between collectives, in which the other ranks would wait for it."""
    errors: list[Exception] = []

    def delayed(write: Callable[..., None]) -> Callable[..., None]:
        def attempt(*arguments: Any) -> None:
            try:
                write(*arguments)
            except Exception as error:  # of any kind: the caller raises it
                errors.append(error)

        return attempt

    originals = [(owner, name, getattr(owner, name)) for owner, name in writes_of_rank_0()]
    for owner, name, write in originals:
        setattr(owner, name, delayed(write))
    try:
        yield errors
    finally:
        for owner, name, write in originals:
            setattr(owner, name, write)


def _make_folder(folder: Path) -> OSError | None:
    """Makes a directory on rank 0; returns its error, the same on all ranks."""
    failed: list[OSError | None] = [None]
    if dist.get_rank() == 0:
        try:
            folder.mkdir()
        except OSError as error:
            failed[0] = error
    dist.broadcast_object_list(failed, src=0)
    return failed[0]


def _raise(error: Exception) -> list[Path]:
    raise error


@torch.no_grad()
def snapshot(directory: Path, models: Sequence[MegatronModule], optimizer: ChainedOptimizer, step: int) -> Snapshot:
    """Copies this rank's shards and, on rank 0, the state common to all ranks, after ``step`` optimizer steps."""
    folder = directory / _FOLDER
    if (problem := _make_folder(folder)) is not None:
        return Snapshot(functools.partial(_raise, problem))
    count_steps_of_nothing(optimizer, step)
    with _existing_objects_frozen():
        state = _sharded_state_dict(models, optimizer, step, is_loading=False)
    strategy = _InProcessSaveStrategy("torch_dist", 1, thread_count=1)
    with _errors_kept() as failed:
        request = dist_checkpointing.save(state, folder, strategy, async_sharded_save=True)
    assert request is not None
    write_random_state = copy_random_state(directory)

    def write() -> list[Path]:
        if failed:
            raise failed[0]
        if request.async_fn is not None:
            request.async_fn()
        return [*sorted(folder.glob(f"__{dist.get_rank()}_*")), write_random_state()]

    def finish() -> list[Path]:
        with _errors_kept() as failed:
            for function in request.finalize_fns:
                function()
        if failed:
            raise failed[0]
        if dist.get_rank() != 0:
            return []
        return sorted(path for path in folder.iterdir() if not path.name.startswith("__"))

    return Snapshot(write, finish)


def load(directory: Path, models: Sequence[MegatronModule], optimizer: ChainedOptimizer) -> int:
    """Restores models, optimizer and random state under the current layout, and returns the optimizer steps taken.

    Where parameters are their own fp32 masters, each rank has restored only its shard of them: gather them afterwards.

    Raises:
        UserError: a tensor is missing, unknown to this model or of another shape; names the tensor.
    """
    folder = directory / _FOLDER
    check_readable(folder)
    sharded = _sharded_state_dict(models, optimizer, 0, is_loading=True)
    with tensors_only(folder):
        _check_tensors(folder, sharded)
        state = dist_checkpointing.load(sharded, folder)
    for number, model in enumerate(models):
        model.load_state_dict(state[f"model{number}"])
    _load_optimizer(optimizer, state["optimizer"])
    restore_random_state(directory)
    return state["step"]


def read_vocab_size(directory: Path) -> int:
    """Number of embedding rows in a checkpoint."""
    with tensors_only(directory / _FOLDER):
        saved = dist_checkpointing.load_tensors_metadata(directory / _FOLDER)
    return saved["embedding.word_embeddings.weight"].global_shape[0]


def _load_optimizer(optimizer: ChainedOptimizer, state: Any) -> None:
    """Restores masters and moments; keeps hyperparameters such as the weight decay as configured."""
    groups = optimizer.param_groups
    configured = [{name: value for name, value in group.items() if name != "params"} for group in groups]
    optimizer.load_state_dict(state)
    for group, hyperparameters in zip(optimizer.param_groups, configured, strict=True):
        group.update(hyperparameters)


def _check_tensors(folder: Path, sharded: dict[str, Any]) -> None:
    """Compares names and global shapes of the saved tensors with those of all ranks."""
    tensors = [tensor for value in nested_values(sharded) for tensor in _sharded_tensors(value)]
    local = {tensor.key: tuple(tensor.global_shape) for tensor in tensors}
    gathered: list[dict[str, tuple[int, ...]]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, local)
    model = {key: shape for shapes in gathered for key, shape in shapes.items()}
    saved = {
        key: tuple(tensor.global_shape) for key, tensor in dist_checkpointing.load_tensors_metadata(folder).items()
    }
    for key, shape in sorted(model.items()):
        if key not in saved:
            raise UserError(f"checkpoint: tensor {key} is missing; {_FIX}")
        if saved[key] != shape:
            raise UserError(f"checkpoint: tensor {key} has shape {saved[key]}, this model needs {shape}; {_FIX}")
    surplus = sorted(saved.keys() - model.keys())
    if surplus:
        raise UserError(f"checkpoint {folder}: has tensors that this model lacks: {some(surplus)}; {_FIX}")


def _sharded_tensors(value: Any) -> list[ShardedTensor]:
    if isinstance(value, ShardedTensorFactory):
        return [tensor for built in nested_values([value.build()]) for tensor in _sharded_tensors(built)]
    return [value] if isinstance(value, ShardedTensor) else []
