"""Gather, experts and combine on one rank as a single autograd function, with a choice of backends."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import increment_version

from dynmoe.config import Config
from dynmoe.config.constants import MOE_BACKENDS, MXFP8_BACKENDS
from dynmoe.errors import ConfigError
from dynmoe.ops.backends import KernelBackend, PackedBackend, grouped_mm, looped_mm
from dynmoe.ops.few_tokens import few_tokens
from dynmoe.ops.gradient_sums import gradient_sum
from dynmoe.ops.mxfp8 import mxfp8_backend
from dynmoe.ops.native import native_activation_backward
from dynmoe.ops.permute import Permutation
from dynmoe.ops.sonic import SonicBackend, load_sonic

Backend = KernelBackend | SonicBackend


def _runs_triton(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the Triton kernels run: on NVIDIA GPUs from Ampere on, or in the interpreter, if not in bf16."""
    if find_spec("triton") is None:
        return False
    if device.type == "cuda":  # as PyTorch calls AMD's too
        return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)
    return bool(import_module("triton").knobs.runtime.interpret) and dtype != torch.bfloat16


@cache
def pick_backend(wanted: str, device: torch.device, dtype: torch.dtype) -> Backend:
    """Returns the backend named ``wanted``; ``auto`` picks the fastest for the device and dtype.

    ``triton``: our own kernels, for GPUs. ``grouped_mm``: PyTorch's grouped GEMM, for fp32, bf16 and fp16 on any
    device. ``loop``: one product for each expert, for any dtype. ``sonic``: SonicMoE's kernels, for bf16 on Hopper and
    Blackwell; never chosen by ``auto``, because it has not been measured yet. ``mxfp8``: MXFP8 products of Blackwell;
    ``mxfp8_emulated``: the same numbers on any device.

    Raises:
        ConfigError: the name is unknown, or the backend does not run on the device.
    """
    field = "train.moe_backend"
    if wanted == "auto":
        kernels = device.type == "cuda" and dtype != torch.float64 and _runs_triton(device, dtype)
        wanted = "triton" if kernels else "loop" if dtype == torch.float64 else "grouped_mm"
    if wanted == "triton":
        if not _runs_triton(device, dtype):
            raise ConfigError(field, wanted, f"does not run on {device}", "use auto")
        from dynmoe.ops.triton.backend import TritonBackend

        return TritonBackend()
    if wanted == "sonic":
        return SonicBackend(load_sonic(device, dtype))
    if wanted in MXFP8_BACKENDS:
        return mxfp8_backend(wanted, device, dtype)
    products = {"grouped_mm": grouped_mm, "loop": looped_mm}
    if wanted not in products:
        raise ConfigError(field, wanted, "is not a known backend", f"use one of {', '.join(MOE_BACKENDS)}")
    return PackedBackend(wanted, products[wanted], native_activation_backward)


def configured_backend(config: Config, device: torch.device) -> Backend:
    """Returns the backend of a run.

    Raises:
        ConfigError: it does not run on the device.
    """
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    return pick_backend(config.train.moe_backend, device, dtype)


class _RoutedExperts(torch.autograd.Function):
    """Saves the tokens and the up projection; the backward pass recomputes everything else."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        gates_TE: Tensor,
        w_up_EHD: Tensor,
        w_down_EDF: Tensor,
        permutation: Permutation,
        backend: KernelBackend,
    ) -> Tensor:
        y_TD, h_NH = backend.forward(x_TD, gates_TE, w_up_EHD, w_down_EDF, permutation)
        ctx.save_for_backward(h_NH, x_TD, gates_TE, w_up_EHD, w_down_EDF, *permutation.tensors)
        ctx.backend = backend
        ctx.weights = (w_up_EHD, w_down_EDF)  # with recomputation, saved tensors are not the parameters themselves
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        h_NH, x_TD, gates_TE, w_up_EHD, w_down_EDF, *tensors = ctx.saved_tensors
        # The backend overwrites h. Autograd cannot see what kernels write, so it is told here.
        increment_version(h_NH)
        of_up, of_down = ctx.weights
        gradients = ctx.backend.backward(
            grad_TD.contiguous(), h_NH, x_TD, gates_TE, w_up_EHD, w_down_EDF, Permutation(*tensors),
            of_weights=any(ctx.needs_input_grad[2:4]), sums=(gradient_sum(of_up), gradient_sum(of_down)),
        )  # fmt: skip
        return *gradients, None, None


def routed_experts(
    x_TD: Tensor, gates_TE: Tensor, w_up_EHD: Tensor, w_down_EDF: Tensor, permutation: Permutation, backend: Backend
) -> Tensor:
    """Sum over the experts of each token of gate * W_down(silu(x W_gate) * (x W_up)), [T, D].

    For the backward pass it saves only x and the up projection of the routed rows. The backward pass overwrites the
    latter and can therefore run only once.

    Args:
        gates_TE: fp32 weight of each expert's output; read where the permutation has a route.
        w_up_EHD: gate and up projections stacked along H = 2F; contraction dimension last, as in ``nn.Linear``.

    Raises:
        RuntimeError: in a second backward pass through the same graph (not ``sonic``).
    """
    if isinstance(backend, SonicBackend):
        return backend.experts(x_TD, gates_TE, w_up_EHD, w_down_EDF, permutation)
    if not torch.is_grad_enabled():  # skipping autograd saves a third of the time for one token
        y_TD = None
        if backend.name == "grouped_mm":
            y_TD = few_tokens(x_TD, gates_TE, w_up_EHD, w_down_EDF, permutation)
        return backend.forward(x_TD, gates_TE, w_up_EHD, w_down_EDF, permutation)[0] if y_TD is None else y_TD
    return _RoutedExperts.apply(x_TD, gates_TE, w_up_EHD, w_down_EDF, permutation, backend)
