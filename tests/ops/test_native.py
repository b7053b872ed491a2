"""The activation's backward pass in C: equal to the one in PyTorch, non-finite values included; how it is compiled."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dynmoe.ops import native
from dynmoe.ops.native import native_activation_backward
from dynmoe.ops.swiglu import gated_activation_backward
from harness.processes import CPU

COMPILER = native._compiler()
compiled = pytest.mark.skipif(COMPILER is None, reason="needs a C compiler")


def case(seed: int, rows: int, width: int, dtype: torch.dtype, scale: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    h_NH = torch.randn(rows, 2 * width, generator=generator).mul(scale).to(dtype)
    grad_NF = torch.randn(rows, width, generator=generator).to(dtype)
    return h_NH, torch.rand(rows, generator=generator), grad_NF


def exact(h_NH: Tensor, gates_N: Tensor, grad_NF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of h, activation and gradient of the gates by autograd in fp64."""
    h_NH = h_NH.double().requires_grad_()
    gates_N = gates_N.double().requires_grad_()
    h1, h2 = h_NH.chunk(2, dim=1)
    out = h1 * torch.sigmoid(h1) * h2 * gates_N[:, None]
    out.backward(grad_NF.double())
    return h_NH.grad, out.detach(), gates_N.grad


@compiled
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-8)])
@given(st.integers(0, 10**6), st.integers(0, 9), st.integers(1, 70), st.sampled_from([0.1, 3.0, 40.0]))
def test_against_autograd_in_double_precision(dtype, error, seed, rows, width, scale):
    h_NH, gates_N, grad_NF = case(seed, rows, width, dtype, scale)
    expected = exact(h_NH, gates_N, grad_NF)
    kernel = native._kernel(dtype)
    assert kernel is not None
    grad_gates_N = native_activation_backward(h_NH, gates_N, grad_NF)
    for value, wanted in zip((h_NH, grad_NF, grad_gates_N), expected, strict=True):
        room = error * wanted.abs().max() if wanted.numel() else 0
        torch.testing.assert_close(value.double(), wanted, rtol=error, atol=float(room))


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_are_not_finite_where_those_of_pytorch_are_not(dtype):
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e10, -1e10, 0.0, -0.0, 88.0, -88.0, 1e-40])
    h1, h2, grad = (values.flatten() for values in torch.meshgrid(special, special, special, indexing="ij"))
    h_NH = torch.stack([h1, h2], dim=1).to(dtype)
    grad_NF = grad[:, None].to(dtype)
    gates_N = torch.ones(len(grad))
    plain = [h_NH.clone(), grad_NF.clone()]
    expected = gated_activation_backward(plain[0], gates_N, plain[1])
    grad_gates_N = native_activation_backward(h_NH, gates_N, grad_NF)
    for value, wanted in zip((h_NH, grad_NF, grad_gates_N), (*plain, expected), strict=True):
        error = 2e-2 if dtype == torch.bfloat16 else 1e-5
        finite = wanted.isfinite()
        assert torch.equal(value.isfinite(), finite)
        torch.testing.assert_close(value[finite], wanted[finite], rtol=error, atol=1e-15)  # σ(-88) is 0


@compiled
def test_every_bit_pattern_of_bf16_is_read_and_rounded_as_pytorch_does():
    """With a gate of 1, h1 = 0 and a gradient g, the gradient of h1 is g · h2 / 2, rounded."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    h_NH = torch.stack([torch.zeros_like(every), every], dim=1)
    grad_NF = torch.full((len(every), 1), 1.0078125).bfloat16()  # makes results that are between two numbers
    native_activation_backward(h_NH, torch.ones(len(every)), grad_NF)
    expected = (every.float() * 1.0078125 * 0.5).bfloat16()
    torch.testing.assert_close(h_NH[:, 0], expected, rtol=0, atol=0, equal_nan=True)


@compiled
def test_threads_change_nothing():
    results = []
    before = torch.get_num_threads()
    for threads in (1, 3):
        h_NH, gates_N, grad_NF = case(0, 1000, 33, torch.float32)
        torch.set_num_threads(threads)
        results.append((native_activation_backward(h_NH, gates_N, grad_NF), h_NH, grad_NF))
    torch.set_num_threads(before)
    assert all(torch.equal(one, three) for one, three in zip(*results, strict=True))


def in_a_process(code: str, **variables: str) -> str:
    done = subprocess.run([sys.executable, "-W", "always", "-c", code], capture_output=True, text=True, check=True,
                          env=os.environ | CPU | variables)  # fmt: skip
    return done.stdout + done.stderr


LOADS = "from dynmoe.ops import native; print(native.load('swiglu_backward.c'))"


@compiled
def test_it_is_compiled_once(tmp_path):
    assert "CDLL" in in_a_process(LOADS, XDG_CACHE_HOME=str(tmp_path))
    (library,) = (tmp_path / "dynmoe").iterdir()
    made = library.stat().st_mtime_ns
    assert "CDLL" in in_a_process(LOADS, XDG_CACHE_HOME=str(tmp_path))
    assert [path.stat().st_mtime_ns for path in (tmp_path / "dynmoe").iterdir()] == [made]


def test_without_a_compiler_pytorch_computes(tmp_path):
    assert in_a_process(LOADS, XDG_CACHE_HOME=str(tmp_path), PATH=str(tmp_path), CC="").strip() == "None"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "_kernel", lambda dtype: None)
        h_NH, gates_N, grad_NF = case(1, 5, 4, torch.float32)
        expected = exact(h_NH, gates_N, grad_NF)
        grad_gates_N = native_activation_backward(h_NH, gates_N, grad_NF)
    torch.testing.assert_close(grad_gates_N.double(), expected[2], rtol=1e-5, atol=1e-6)


def test_a_compiler_that_fails_is_reported(tmp_path):
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho 'no room left' >&2\nexit 1\n")
    broken.chmod(0o755)
    said = in_a_process(LOADS, XDG_CACHE_HOME=str(tmp_path), CC=str(broken))
    assert "swiglu_backward.c was not compiled: no room left; PyTorch computes the same more slowly" in said
    assert "None" in said.splitlines()
    assert not list((tmp_path / "dynmoe").iterdir())


@pytest.mark.parametrize(("before", "problem"), [
    ("os.environ['CC'] = 'no_such_compiler -m64'", "CC=no_such_compiler is not found"),
    ("os.environ['CC'] = 'gcc \"'", "No closing quotation"),
    # As in a container, for a user id without a name.
    ("del os.environ['HOME']; pwd.getpwuid = lambda uid: {}[uid]", "Could not determine home directory."),
])  # fmt: skip
@compiled
def test_what_prevents_compiling_is_reported(before, problem):
    said = in_a_process(f"import os, pwd; {before}; {LOADS}", XDG_CACHE_HOME="", HOME="/nowhere")
    assert f"swiglu_backward.c was not compiled: {problem}; PyTorch computes" in said


@compiled
def test_the_compiler_may_have_options(tmp_path):
    said = in_a_process(LOADS, XDG_CACHE_HOME=str(tmp_path), CC=f"{COMPILER[0]} -include {tmp_path}/nowhere.h")
    assert "was not compiled" in said
    assert "nowhere.h" in said


def test_a_folder_that_cannot_be_written_is_reported(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    if COMPILER is None:
        pytest.skip("needs a C compiler")
    said = in_a_process(LOADS, XDG_CACHE_HOME=str(blocked))
    assert "was not compiled: [Errno" in said


def test_other_types_and_strides_are_left_to_pytorch():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert native._kernel(torch.float64) is None
    h_NH, gates_N, grad_NF = case(2, 6, 5, torch.float32)
    expected = exact(h_NH, gates_N, grad_NF)
    strided = torch.empty(6, 20)[:, ::2].copy_(h_NH)
    native_activation_backward(strided, gates_N, grad_NF)
    torch.testing.assert_close(strided.double(), expected[0], rtol=1e-5, atol=1e-5)
    for dtype in (torch.bfloat16, torch.float64):
        h_NH, gates_N, grad_NF = case(2, 6, 5, torch.float32)
        expected = exact(h_NH, gates_N.to(dtype), grad_NF)
        grad_gates_N = native_activation_backward(h_NH, gates_N.to(dtype), grad_NF)
        assert grad_gates_N.dtype == dtype
        for value, wanted in ((h_NH, expected[0]), (grad_NF, expected[1]), (grad_gates_N, expected[2])):
            torch.testing.assert_close(value.double(), wanted, rtol=2e-2, atol=2e-2)


def test_the_source_is_part_of_the_package():
    assert "ops/*.c" in (Path(native.__file__).parents[2] / "pyproject.toml").read_text()
