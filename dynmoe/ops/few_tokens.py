"""Routed experts for few tokens in C, as in generation on a CPU: time goes into reading weights and into calls."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from dynmoe.ops.native import load, thread_pool
from dynmoe.ops.permute import Permutation

# Above, the gain shrinks, and outputs stay equal to those of exports bit for bit.
_MOST_TOKENS = 16
# Less is not worth another thread.
_BYTES_PER_THREAD = 1 << 20

_Kernels = tuple[Callable[..., None], Callable[..., None]]


def few_tokens(
    x_TD: Tensor, gates_TE: Tensor, w_up_EHD: Tensor, w_down_EDF: Tensor, permutation: Permutation
) -> Tensor | None:
    """The output of a backend's ``forward``, without gradients, for at most 16 tokens in fp32 on a CPU.

    Returns:
        None for other tokens, and without a C compiler.
    """
    tensors = (x_TD, w_up_EHD, w_down_EDF)
    if not 0 < len(x_TD) <= _MOST_TOKENS or x_TD.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    if not all(tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in tensors):
        return None
    if gates_TE.dtype != torch.float32:
        return None
    kernels = _kernels()
    num_rows = permutation.token_N.shape[0]
    if kernels is None or num_rows == 0:
        return None
    num_experts, depth, width = w_down_EDF.shape
    gates_N = permutation.of_rows(gates_TE)
    activation_NF = x_TD.new_empty(num_rows, width)
    y_TD = torch.zeros_like(x_TD)
    x, gates, token, ends, activation, y, up, down = (
        tensor.data_ptr()
        for tensor in (
            x_TD, gates_N, permutation.token_N, permutation.ends_E, activation_NF, y_TD, w_up_EHD, w_down_EDF,
        )
    )  # fmt: skip
    sizes = (num_experts, depth, width)
    up_kernel, down_kernel = kernels
    threads = _num_threads(12 * min(num_rows, num_experts) * depth * width)
    _in_parts(width, threads, lambda *part: up_kernel(x, gates, token, ends, up, activation, *sizes, *part))
    _in_parts(depth, threads, lambda *part: down_kernel(activation, token, ends, down, y, *sizes, *part))
    return y_TD


def _num_threads(bytes_read: int) -> int:
    return max(1, min(torch.get_num_threads(), bytes_read // _BYTES_PER_THREAD))


def _in_parts(size: int, parts: int, run: Callable[[int, int], None]) -> None:
    """Runs ``run(first, last)`` for equal parts of ``size``, each on a thread without Python's lock."""
    if parts == 1:
        run(0, size)
        return
    ends = [size * part // parts for part in range(parts + 1)]
    list(thread_pool().map(run, ends[:-1], ends[1:]))


@cache
def _kernels() -> _Kernels | None:
    library = load("few_tokens.c")
    if library is None:
        return None
    up: Callable[..., None] = library.few_tokens_up
    down: Callable[..., None] = library.few_tokens_down
    for kernel, pointers in ((up, 6), (down, 5)):
        kernel.argtypes = [ctypes.c_void_p] * pointers + [ctypes.c_int64] * 5  # type: ignore[attr-defined]
        kernel.restype = None  # type: ignore[attr-defined]
    return up, down
