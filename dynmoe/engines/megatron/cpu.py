"""Megatron-Core on machines without a GPU; imported there only, and known to nothing else.

Megatron names CUDA in its own code: devices of new tensors, streams, random states, names of types. Its modules get a
``torch`` of their own, in which CUDA is the CPU. The real one stays as it is.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.optimizer import clip_grads
from megatron.core.optimizer import optimizer as megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.pipeline_parallel import p2p_communication
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.transformer.moe import token_dispatcher
from torch.overrides import TorchFunctionMode

# What the engine uses, as far as this version has it; modules that are loaded later would see the real torch.
_MODULES = (
    "dist_checkpointing.strategies.state_dict_saver",
    "dist_checkpointing.strategies.torch",
    "distributed",
    "models.gpt.gpt_layer_specs",
    "models.hybrid.hybrid_model",
    "optimizer",
    "pipeline_parallel.schedules",
    "transformer.moe.moe_layer",
)


class _Inert:
    """Stands in for a stream or an event: everything on a CPU happens at once."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def synchronize(self) -> None: ...

    def record(self, *args: Any) -> None: ...

    def record_event(self, *args: Any) -> _Inert:
        return _Inert()


class _Namespace(types.ModuleType):
    """A copy of a module in which some names mean something else."""

    def __init__(self, original: types.ModuleType, **others: Any) -> None:
        super().__init__(original.__name__)
        self.__dict__.update(vars(original), **others)
        self._original = original

    def __getattr__(self, name: str) -> Any:  # what the original loads lazily
        return getattr(self._original, name)


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The function that makes a tensor, with ``device="cuda"`` read as the CPU."""

    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return make


class _CudaNames(TorchFunctionMode):
    """``Tensor.type()`` names CUDA types, which optimizers ask for; ``Tensor.cuda()`` leaves a tensor where it is."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.type and len(args) == 1:
            return result.replace("torch.", "torch.cuda.", 1)
        return result


def _with_cuda_names(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with _CudaNames():
            return function(*args, **kwargs)

    return call


def _keeping_what_is_sent(operations: Callable[..., Any]) -> Callable[..., Any]:
    """Sends aliases: the schedule frees what it has handed over, and gloo, unlike a stream, may send it later."""

    @functools.wraps(operations)
    def call(*, tensor_send_prev: torch.Tensor | None, tensor_send_next: torch.Tensor | None, **kwargs: Any) -> Any:
        previous, following = (x if x is None else x.detach() for x in (tensor_send_prev, tensor_send_next))
        return operations(tensor_send_prev=previous, tensor_send_next=following, **kwargs)

    return call


def _cpu_device() -> torch.device:
    return torch.device("cpu")


def _as_numpy(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Megatron converts what it moves, and nothing needs to move; all-to-all takes split sizes as numbers."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _nothing(*args: Any, **kwargs: Any) -> None: ...


def _random_state(*args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_random_state(state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    torch.set_rng_state(state)


def _install() -> None:
    for name in _MODULES:
        package, _, _ = f"megatron.core.{name}".rpartition(".")
        if importlib.util.find_spec(package):
            importlib.import_module(f"megatron.core.{name}")
    random = _Namespace(torch.cuda.random, get_rng_state=_random_state, set_rng_state=_set_random_state)
    cuda = _Namespace(
        torch.cuda, current_device=_cpu_device, synchronize=_nothing, Stream=_Inert, Event=_Inert,
        current_stream=_Inert, default_stream=_Inert, stream=lambda stream: contextlib.nullcontext(),
        get_rng_state=_random_state, set_rng_state=_set_random_state, manual_seed=torch.manual_seed, random=random,
        empty_cache=_nothing,
    )  # fmt: skip
    factories = ("arange", "empty", "full", "ones", "rand", "randn", "tensor", "zeros")
    replaced = _Namespace(torch, cuda=cuda, **{name: _on_cpu(getattr(torch, name)) for name in factories})
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and getattr(module, "torch", None) is torch:
            module.torch = replaced  # type: ignore[attr-defined]
    p2p_communication._p2p_ops = _keeping_what_is_sent(p2p_communication._p2p_ops)
    megatron_random._get_cuda_rng_state = _random_state
    megatron_random._set_cuda_rng_state = _set_random_state
    for owner, name in (
        (DistributedOptimizer, "__init__"),
        (DistributedOptimizer, "get_parameter_state_dp_zero"),
        (LanguageModule, "setup_embeddings_and_output_layer"),
        (clip_grads, "clip_grad_by_total_norm_fp32"),
        (megatron_optimizer, "clip_grad_by_total_norm_fp32"),
    ):
        setattr(owner, name, _with_cuda_names(getattr(owner, name)))
    token_dispatcher.maybe_move_tensor_to_cpu = _as_numpy


_install()
