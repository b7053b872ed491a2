"""Code in C, compiled once on each kind of machine and cached: loading, and the gated activation's backward pass."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from dynmoe.ops.swiglu import gated_activation_backward

_COMPILERS = ("cc", "gcc", "clang")
# No -ffast-math: non-finite values must stay what they are. A loop may still be vectorized if no operation can trap.
_FLAGS = ("-O3", "-march=native", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared")
_TIMEOUT_S = 120
# Fewer rows are not worth another thread.
_ROWS_PER_THREAD = 256

_Kernel = Callable[..., None]


def native_activation_backward(h_NH: Tensor, gates_N: Tensor, grad_NF: Tensor) -> Tensor:
    """:func:`gated_activation_backward` in one pass over memory, where it can be compiled; else the same in PyTorch."""
    kernel = _kernel(h_NH.dtype) if h_NH.device.type == "cpu" else None
    fits = gates_N.dtype == torch.float32 and grad_NF.dtype == h_NH.dtype
    if kernel is None or not fits or not all(tensor.is_contiguous() for tensor in (h_NH, gates_N, grad_NF)):
        return gated_activation_backward(h_NH, gates_N, grad_NF)
    grad_gates_N = torch.empty_like(gates_N)
    num_rows, width = grad_NF.shape
    threads = max(1, min(torch.get_num_threads(), num_rows // _ROWS_PER_THREAD))
    ends = [num_rows * thread // threads for thread in range(threads + 1)]

    def run(first: int, last: int) -> None:
        parts = (tensor[first:].data_ptr() for tensor in (h_NH, gates_N, grad_NF, grad_gates_N))
        kernel(*parts, last - first, width)  # without Python's lock

    if threads == 1:
        run(0, num_rows)
    else:
        list(thread_pool().map(run, ends[:-1], ends[1:]))
    return grad_gates_N


@cache
def thread_pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="dynmoe_native")


@cache
def _kernel(dtype: torch.dtype) -> _Kernel | None:
    name = {torch.bfloat16: "bf16", torch.float32: "fp32"}.get(dtype)
    library = load("swiglu_backward.c") if name is not None else None
    if library is None:
        return None
    kernel: _Kernel = library[f"swiglu_backward_{name}"]
    kernel.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_int64] * 2  # type: ignore[attr-defined]
    kernel.restype = None  # type: ignore[attr-defined]
    return kernel


@cache
def load(name: str) -> ctypes.CDLL | None:
    """Loads the library of a source file of this folder; compiles it if this kind of machine has not yet.

    It lies in ``$XDG_CACHE_HOME/dynmoe`` (default ``~/.cache/dynmoe``). Its name covers source, compiler, flags and
    instruction set, because a home directory may be shared by different machines. ``CC`` selects the compiler, with
    options if it needs some.

    Returns:
        None if there is no C compiler, or if it fails, which is reported as a warning.
    """
    source = Path(__file__).with_name(name)
    try:
        compiler = _compiler()
        if compiler is None:
            return None
        facts = repr((compiler, os.stat(compiler[0]).st_mtime, _FLAGS, _machine()))
        key = hashlib.sha256(source.read_bytes() + facts.encode()).hexdigest()[:16]
        # A user without a home directory, as in some containers, is a RuntimeError; an odd quote in CC a ValueError.
        folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dynmoe"
        target = folder / f"{source.stem}-{key}.so"
        if not target.exists():
            folder.mkdir(parents=True, exist_ok=True)
            _compile(compiler, source, target)
        return ctypes.CDLL(str(target))
    except (OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
        output = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        problem = output[0] if output else type(error).__name__
        warnings.warn(f"{name} was not compiled: {problem}; PyTorch computes the same more slowly", stacklevel=2)
        return None


def _compiler() -> tuple[str, ...] | None:
    """The C compiler with its options; None if there is none.

    Raises:
        FileNotFoundError: the one that ``CC`` names is not there.
    """
    if chosen := shlex.split(os.environ.get("CC", "")):
        found = shutil.which(chosen[0])
        if found is None:
            raise FileNotFoundError(f"CC={chosen[0]} is not found")
        return found, *chosen[1:]
    return next(((found,) for name in _COMPILERS if (found := shutil.which(name)) is not None), None)


def _machine() -> str:
    """The instruction set, by what Linux says of its cores."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    facts = (line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part")))
    return platform.machine() + "".join(sorted(set(facts)))


def _compile(compiler: Sequence[str], source: Path, target: Path) -> None:
    """Compiles beside ``target`` and renames, so that other processes never see half a library."""
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        built = Path(folder) / target.name
        command = [*compiler, *_FLAGS, str(source), "-o", str(built), "-lm"]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_TIMEOUT_S)
        built.rename(target)
