"""Experts for few tokens in C give what the other backends give."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dynmoe.ops import few_tokens as module
from dynmoe.ops import native, routed_experts
from dynmoe.ops.backends import PackedBackend, looped_mm
from dynmoe.ops.few_tokens import few_tokens
from dynmoe.ops.permute import Permutation
from dynmoe.ops.routed_experts import pick_backend

LOOP = PackedBackend("loop", looped_mm)
compiled = pytest.mark.skipif(native._compiler() is None, reason="needs a C compiler")


def case(tokens: int, depth: int, width: int, experts: int = 5, share: float = 0.4, seed: int = 0):
    """x, gates, both weights and the permutation of a random map."""
    generator = torch.Generator().manual_seed(seed)
    x_TD, gates_TE, w_up_EHD, w_down_EDF = (
        torch.randn(shape, generator=generator)
        for shape in ((tokens, depth), (tokens, experts), (experts, 2 * width, depth), (experts, depth, width))
    )
    map_TE = torch.rand(tokens, experts, generator=generator) < share
    return x_TD, gates_TE, w_up_EHD, w_down_EDF, Permutation.of(map_TE)


def exact(*arguments) -> Tensor:
    *tensors, permutation = arguments
    return LOOP.forward(*(tensor.double() for tensor in tensors), permutation)[0]


@compiled
@given(st.integers(1, 16), st.integers(1, 40), st.integers(1, 40), st.sampled_from([0.1, 0.5, 1.0]), st.integers(0, 99))
def test_against_a_loop_in_double_precision(tokens, depth, width, share, seed):
    arguments = case(tokens, depth, width, share=share, seed=seed)
    found = few_tokens(*arguments)
    if found is None:
        assert len(arguments[-1].token_N) == 0
        return
    expected = exact(*arguments)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()) + 1e-7)


@compiled
def test_threads_compute_the_same_bits():
    arguments = case(16, 129, 67, experts=3)
    found = []
    with pytest.MonkeyPatch.context() as patch:
        for threads in (1, 2, 3):
            patch.setattr(module, "_num_threads", lambda bytes_read, threads=threads: threads)
            found.append(few_tokens(*arguments))
    assert all(torch.equal(found[0], other) for other in found)


@compiled
def test_values_are_not_finite_where_those_of_pytorch_are_not():
    x_TD, *others = case(6, 8, 8, share=1.0)
    x_TD[1, 2] = float("nan")
    x_TD[3, 4] = float("inf")
    x_TD[4] *= 1e30
    found = few_tokens(x_TD, *others)
    expected = LOOP.forward(x_TD, *others)[0]
    assert not expected[[1, 3, 4]].isfinite().all()
    assert torch.equal(found.isfinite(), expected.isfinite())


@compiled
def test_the_layer_uses_it_without_gradients_only(monkeypatch):
    calls = []

    def counted(*arguments):
        calls.append(len(arguments[0]))
        return few_tokens(*arguments)

    monkeypatch.setattr(import_module("dynmoe.ops.routed_experts"), "few_tokens", counted)
    backend = pick_backend("auto", torch.device("cpu"), torch.float32)
    arguments = case(3, 16, 16)
    with_gradients = routed_experts(*arguments, backend)
    assert not calls
    with torch.inference_mode():
        without = routed_experts(*arguments, backend)
    assert calls == [3]
    torch.testing.assert_close(without, with_gradients, rtol=1e-5, atol=1e-5)


def test_other_tokens_are_left_to_pytorch(monkeypatch):
    assert few_tokens(*case(17, 8, 8)) is None
    assert few_tokens(*case(4, 8, 8, share=0.0)) is None
    *tensors, permutation = case(4, 8, 8)
    assert few_tokens(*(tensor.bfloat16() for tensor in tensors), permutation) is None
    x_TD, gates_TE, *weights = tensors
    assert few_tokens(x_TD, gates_TE.bfloat16(), *weights, permutation) is None
    view_TE = torch.cat([gates_TE, gates_TE], dim=1)[:, : gates_TE.shape[1]]  # as of identity experts
    assert torch.equal(few_tokens(x_TD, view_TE, *weights, permutation), few_tokens(*tensors, permutation))
    monkeypatch.setattr(module, "_kernels", lambda: None)
    arguments = case(4, 8, 8)
    assert few_tokens(*arguments) is None
    with torch.no_grad():
        found = routed_experts(*arguments, pick_backend("auto", torch.device("cpu"), torch.float32))
    torch.testing.assert_close(found.double(), exact(*arguments), rtol=1e-5, atol=1e-5)
