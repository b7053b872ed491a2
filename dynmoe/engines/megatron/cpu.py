"""Patches that let Megatron-Core run on a machine without a GPU; imported only there.

Megatron hard-codes CUDA: devices of new tensors, streams, random states, type names. Its modules get their own copy of
``torch`` in which CUDA means the CPU. The real ``torch`` is not changed.
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

# Modules that the engine uses, where this version has them. A module imported later would see the real torch.
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


class _NoOp:
    """Replaces streams and events; CPU operations are synchronous."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def synchronize(self) -> None: ...

    def record(self, *args: Any) -> None: ...

    def record_event(self, *args: Any) -> _NoOp:
        return _NoOp()


class _PatchedModule(types.ModuleType):
    """A copy of a module with some attributes replaced."""

    def __init__(self, original: types.ModuleType, **replacements: Any) -> None:
        super().__init__(original.__name__)
        self.__dict__.update(vars(original), **replacements)
        self._original = original

    def __getattr__(self, name: str) -> Any:  # attributes that the original loads lazily
        return getattr(self._original, name)


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Wraps a tensor factory so that ``device="cuda"`` means the CPU."""

    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return make


class _CudaNames(TorchFunctionMode):
    """Makes ``Tensor.type()`` return CUDA names, which optimizers compare with, and ``Tensor.cuda()`` a no-op."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.type and len(args) == 1:
            return f"torch.cuda.{result.rpartition('.')[2]}"  # also of meta tensors
        return result


def _with_cuda_names(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with _CudaNames():
            return function(*args, **kwargs)

    return call


def _with_detached_sends(operations: Callable[..., Any]) -> Callable[..., Any]:
    """Sends aliases of the tensors: the schedule frees its outputs, and gloo may not have sent them yet."""

    @functools.wraps(operations)
    def call(*, tensor_send_prev: torch.Tensor | None, tensor_send_next: torch.Tensor | None, **kwargs: Any) -> Any:
        previous, following = (x if x is None else x.detach() for x in (tensor_send_prev, tensor_send_next))
        return operations(tensor_send_prev=previous, tensor_send_next=following, **kwargs)

    return call


def _as_numpy(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Replaces ``maybe_move_tensor_to_cpu``: converts without moving, as all-to-all needs split sizes as numbers."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _no_op(*args: Any, **kwargs: Any) -> None: ...


def _get_rng_state(*args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    torch.set_rng_state(state)


def _install() -> None:
    for name in _MODULES:
        package, _, _ = f"megatron.core.{name}".rpartition(".")
        if importlib.util.find_spec(package):
            importlib.import_module(f"megatron.core.{name}")
    random = _PatchedModule(torch.cuda.random, get_rng_state=_get_rng_state, set_rng_state=_set_rng_state)
    cuda = _PatchedModule(
        torch.cuda, current_device=lambda: torch.device("cpu"), synchronize=_no_op, Stream=_NoOp, Event=_NoOp,
        current_stream=_NoOp, default_stream=_NoOp, stream=lambda stream: contextlib.nullcontext(),
        get_rng_state=_get_rng_state, set_rng_state=_set_rng_state, manual_seed=torch.manual_seed, random=random,
        empty_cache=_no_op,
    )  # fmt: skip
    factories = ("arange", "empty", "full", "ones", "rand", "randn", "tensor", "zeros")
    replaced = _PatchedModule(torch, cuda=cuda, **{name: _on_cpu(getattr(torch, name)) for name in factories})
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and getattr(module, "torch", None) is torch:
            module.torch = replaced  # type: ignore[attr-defined]
    p2p_communication._p2p_ops = _with_detached_sends(p2p_communication._p2p_ops)
    megatron_random._get_cuda_rng_state = _get_rng_state
    megatron_random._set_cuda_rng_state = _set_rng_state
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
