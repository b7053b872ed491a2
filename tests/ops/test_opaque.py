"""The operator of exported models: against a loop over tokens, and by what it does not do."""

from __future__ import annotations

import pytest
import torch

from dynmoe.ops import opaque
from dynmoe.ops.opaque import opaque_experts, static_shape_experts
from tests import oracles

TOKENS = 11
HIDDEN = 16
EXPERTS = 4
WIDTH = 24


def case(seed=0, tokens=TOKENS, width=WIDTH, most=EXPERTS, dtype=torch.float32):
    """Tokens with no expert, with one and with up to ``most``; an expert without tokens."""
    generator = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(tokens, HIDDEN, generator=generator, dtype=dtype)
    order_TE = torch.rand(tokens, EXPERTS, generator=generator).argsort(dim=1)
    counts_T = torch.randint(0, most + 1, (tokens,), generator=generator)
    map_TE = order_TE < counts_T[:, None]
    map_TE[:, 2] = False
    gates_TE = torch.rand(tokens, EXPERTS, generator=generator)
    up_EHD = torch.randn(EXPERTS, 2 * width, HIDDEN, generator=generator, dtype=dtype) * 0.3
    down_EDF = torch.randn(EXPERTS, HIDDEN, width, generator=generator, dtype=dtype) * 0.3
    return x_TD, map_TE, gates_TE, up_EHD, down_EDF


def oracle(x_TD, map_TE, gates_TE, up_EHD, down_EDF):
    return oracles.moe_output(x_TD, gates_TE.to(x_TD.dtype), map_TE, up_EHD, down_EDF)


@pytest.mark.parametrize(
    ("tokens", "width", "dtype"),
    [(TOKENS, WIDTH, torch.float32), (1, WIDTH, torch.float32), (100, WIDTH, torch.float32),
     (TOKENS, 6, torch.float32), (TOKENS, WIDTH, torch.float64)],
)  # fmt: skip
def test_outputs_and_gradients(tokens, width, dtype):
    given = case(tokens=tokens, width=width, dtype=dtype)
    upstream_TD = torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(1), dtype=dtype)
    found = []
    for function in (lambda *tensors: opaque_experts(*tensors, EXPERTS), oracle):
        tensors = [tensor.clone().requires_grad_(tensor.is_floating_point()) for tensor in given]
        y_TD = function(*tensors)
        y_TD.backward(upstream_TD)
        zeros = [torch.zeros_like(t) if t.grad is None else t.grad for t in tensors if t.is_floating_point()]
        found.append([y_TD.detach(), *zeros])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_frozen_experts_have_no_gradients(monkeypatch):
    x_TD, map_TE, gates_TE, up_EHD, down_EDF = case()
    products = []
    monkeypatch.setattr(opaque, "grouped_mm", lambda a, b, ends: products.append(b.dim()) or looped(a, b, ends))
    looped = opaque.looped_mm
    opaque_experts(x_TD.requires_grad_(), map_TE, gates_TE.requires_grad_(), up_EHD, down_EDF, EXPERTS).sum().backward()
    assert x_TD.grad.abs().sum() > 0
    assert gates_TE.grad.abs().sum() > 0
    assert up_EHD.grad is None
    assert 2 not in products, "a product over rows was made, which is a gradient of weights"
    up_EHD.requires_grad_()
    opaque_experts(x_TD, map_TE, gates_TE, up_EHD, down_EDF, EXPERTS).sum().backward()
    assert products.count(2) == 2


@pytest.mark.parametrize("most", [1, 3, EXPERTS])
@pytest.mark.parametrize("rows_at_a_time", [1, 8, 1 << 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_static_shapes_equal_the_counted_path(monkeypatch, most, rows_at_a_time, dtype):
    """The path of a GPU, on a CPU; rows past the last route hold NaN."""
    monkeypatch.setattr(opaque, "_MAX_ROWS_AT_ONCE", rows_at_a_time)
    product = torch.nn.functional.grouped_mm

    def spoilt(a, b, offs):
        out = product(a, b, offs=offs)
        out[offs[-1] :] = torch.nan
        return out

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", spoilt)
    given = case(most=most, dtype=dtype)
    found = static_shape_experts(*given, most)
    monkeypatch.undo()
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(found, opaque_experts(*given, most), rtol=0, atol=tolerance)
    assert torch.equal(static_shape_experts(*given, most), static_shape_experts(*given, most))


def test_static_shapes_do_not_synchronize():
    """Meta tensors: reading a value, or a size that depends on a value, raises."""
    with torch.device("meta"):
        given = [torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in case(dtype=torch.bfloat16)]
        assert static_shape_experts(*given, EXPERTS).shape == (TOKENS, HIDDEN)
        with pytest.raises(NotImplementedError):
            opaque.Permutation.of(given[1])  # which synchronizes


def test_the_operator_passes_opcheck():
    x_TD, map_TE, gates_TE, up_EHD, down_EDF = case()
    floats = [tensor.requires_grad_() for tensor in (x_TD, gates_TE, up_EHD, down_EDF)]
    given = (floats[0], map_TE, *floats[1:], EXPERTS)
    results = torch.library.opcheck(torch.ops.dynmoe.experts_1.default, given)
    assert set(results.values()) == {"SUCCESS"}
