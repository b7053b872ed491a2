"""The start of one rank of many, alone: its process groups send nothing, and its weights take no memory."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from dynmoe.config import Config
from dynmoe.engines import make_engine
from dynmoe.engines.whole_matrices import MatrixExchange


def bytes_at_start(config: Config, vocab_size: int, rank: int, world_size: int, ranks_per_node: int) -> int:
    """Bytes of all tensors of a rank when its engine has been built, counting shared storage once.

    Process groups, model, gradient buffers and optimizer are those of a real start, on the CPU. What an engine
    allocates in its first step, such as activations, is missing. The process cannot be used for a run afterwards.
    """
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank % ranks_per_node),
        "LOCAL_WORLD_SIZE": str(ranks_per_node), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0",
    }  # fmt: skip
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    # Muon plans the way of each part of a matrix from what all ranks hold; it allocates nothing before the first step.
    without_plan = patch.object(MatrixExchange, "__init__", lambda *args: None)
    with _only_fake_groups(), without_plan, _WithoutMemory():
        engine = make_engine(config, vocab_size)
        found = _bytes_of_tensors()
    del engine  # existed until here
    return found


class _WithoutMemory(TorchDispatchMode):
    """Creates floating-point tensors on the meta device, whatever device they are for. Others remain real."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        real = [tensor for tensor in tensors if not tensor.is_meta]
        on_meta = len(real) < len(tensors)
        names = {argument.name for argument in func._schema.arguments}
        if "device" in names and (on_meta or not tensors):
            dtype = kwargs.get("dtype") or (tensors[0].dtype if tensors else torch.get_default_dtype())
            if dtype.is_floating_point:
                kwargs["device"] = torch.device("meta")
        if on_meta:
            kwargs.pop("generator", None)  # there are no numbers to draw
        if on_meta and real:
            args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
        return func(*args, **kwargs)


@contextmanager
def _only_fake_groups() -> Iterator[None]:
    """Makes new process groups fake as well, whatever backend is asked for, and other ranks' objects equal to ours."""
    new_group = dist.new_group

    def fake_group(*args: Any, backend: str | None = None, **kwargs: Any) -> dist.ProcessGroup:
        return new_group(*args, **kwargs)

    def gather_own(gathered: list[Any], own: Any, group: dist.ProcessGroup | None = None) -> None:
        gathered[:] = [own] * len(gathered)

    with patch.object(dist, "new_group", fake_group), patch.object(dist, "all_gather_object", gather_own):
        yield


def _bytes_of_tensors() -> int:
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, Tensor):
            storage = thing.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())
