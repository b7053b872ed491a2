"""Every backend against the loop over tokens and experts, with all gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from dynmoe.config.constants import MOE_BACKENDS, MXFP8_BACKENDS
from dynmoe.errors import ConfigError
from dynmoe.ops import Permutation, linear_fp32, pick_backend, routed_experts, swiglu
from dynmoe.ops.backends import grouped_mm, looped_mm
from tests import oracles

WIDTH = 8
HIDDEN = 16
counts = st.lists(st.integers(0, 5), min_size=1, max_size=5)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # kernels: compiled, or in the interpreter
NAMES = [name for name in MOE_BACKENDS if name not in ("auto", "sonic", *MXFP8_BACKENDS)]


@pytest.mark.parametrize("product", [grouped_mm, looped_mm])
@given(tokens_per_expert=counts)
def test_grouped_products_equal_a_loop(product, tokens_per_expert):
    num_rows = sum(tokens_per_expert)
    num_experts = len(tokens_per_expert)
    ends = torch.tensor(tokens_per_expert).cumsum(0).to(torch.int32)
    rows = torch.randn(num_rows, HIDDEN)
    weights = torch.randn(num_experts, HIDDEN, WIDTH)
    groups = rows.split(tokens_per_expert)
    expected = torch.cat([group @ weight for group, weight in zip(groups, weights, strict=True)])
    torch.testing.assert_close(product(rows, weights, ends), expected)

    other = torch.randn(num_rows, WIDTH)
    parts = zip(groups, other.split(tokens_per_expert), strict=True)
    expected = torch.stack([group.t() @ part for group, part in parts])
    torch.testing.assert_close(product(rows.t(), other, ends), expected)


def random_case(seed: int, tokens: int, experts: int, density: float):
    """Map, upstream gradient, and the four inputs that have gradients."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    routing_map = torch.rand(tokens, experts, generator=generator) < density
    gates = torch.rand(tokens, experts, generator=generator) * routing_map
    leaves = [normal(tokens, HIDDEN), gates, 0.3 * normal(experts, 2 * WIDTH, HIDDEN), normal(experts, HIDDEN, WIDTH)]
    return routing_map.to(DEVICE), normal(tokens, HIDDEN).to(DEVICE), [leaf.to(DEVICE) for leaf in leaves]


def with_gradients(compute, leaves, upstream):
    inputs = [leaf.clone().requires_grad_() for leaf in leaves]
    output = compute(*inputs)
    gradients = torch.autograd.grad(output, inputs, upstream, allow_unused=True)
    zero = (torch.zeros_like(leaf) for leaf in inputs)
    return [output.detach(), *(z if g is None else g for g, z in zip(gradients, zero, strict=True))]


@pytest.mark.parametrize("name", NAMES)
@given(
    st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 5), st.sampled_from([0.0, 0.3, 0.7, 1.0]),
    st.sampled_from([1, 1 << 18]),
)  # fmt: skip
def test_output_and_all_gradients_equal_a_loop_over_tokens(name, seed, tokens, experts, density, chunk):
    routing_map, upstream, leaves = random_case(seed, tokens, experts, density)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(swiglu, "_CHUNK_ELEMENTS_CPU", chunk)
        permutation = Permutation.of(routing_map)
        ours = with_gradients(
            lambda *a: routed_experts(*a, permutation, pick_backend(name, DEVICE, torch.float32)), leaves, upstream
        )
    oracle = with_gradients(
        lambda x, gates, up, down: oracles.moe_output(x, gates, routing_map, up, down), leaves, upstream
    )
    for value, expected, what in zip(ours, oracle, ("y", "x", "gates", "w_up", "w_down"), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5, msg=lambda m, w=what: f"{w}: {m}")


@pytest.mark.parametrize("name", NAMES)
def test_only_tokens_and_the_up_projection_are_saved(name):
    routing_map, _, leaves = random_case(0, 64, 4, 0.5)
    inputs = [leaf.requires_grad_() for leaf in leaves]
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        routed_experts(*inputs, Permutation.of(routing_map), pick_backend(name, DEVICE, torch.float32))
    own = {id(t) for t in inputs[2:]}
    numbers = sum(t.numel() for t in saved if id(t) not in own and t.is_floating_point())
    indices = sum(t.numel() for t in saved if not t.is_floating_point())
    rows = int(routing_map.sum())
    assert numbers == 64 * HIDDEN + rows * 2 * WIDTH + 64 * 4  # tokens, h, gates
    assert indices == 3 * rows + 64 + 1 + 4


@pytest.mark.parametrize("name", NAMES)
def test_a_second_backward_pass_raises(name):
    routing_map, upstream, leaves = random_case(0, 6, 3, 0.5)
    inputs = [leaf.requires_grad_() for leaf in leaves]
    y = routed_experts(*inputs, Permutation.of(routing_map), pick_backend(name, DEVICE, torch.float32))
    y.backward(upstream, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(upstream)


@pytest.mark.parametrize("name", ["grouped_mm", "loop"])  # Triton's interpreter has no products in bf16
def test_bf16_stays_close_to_fp32(name):
    routing_map, upstream, leaves = random_case(0, 64, 4, 0.5)
    permutation = Permutation.of(routing_map)
    exact = with_gradients(
        lambda *a: routed_experts(*a, permutation, pick_backend(name, DEVICE, torch.float32)), leaves, upstream
    )
    gates = leaves.pop(1)
    low = [leaf.bfloat16() for leaf in leaves]
    low.insert(1, gates)
    rounded = with_gradients(
        lambda *a: routed_experts(*a, permutation, pick_backend(name, DEVICE, torch.float32)), low, upstream.bfloat16()
    )
    for value, expected in zip(rounded, exact, strict=True):
        assert value.dtype == (torch.float32 if expected.shape == gates.shape else torch.bfloat16)
        assert ((value.float() - expected).norm() / expected.norm()).item() < 0.01


def test_logits_in_fp32_of_bf16_operands():
    x = torch.randn(5, HIDDEN).bfloat16()
    weight = torch.randn(3, HIDDEN).bfloat16()
    upstream = torch.randn(5, 3)
    results = []
    for compute in (linear_fp32, lambda x, w: F.linear(x.float(), w.float())):
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        y = compute(*leaves)
        y.backward(upstream)
        results.append([y.detach(), *(leaf.grad for leaf in leaves)])
    for ours, plain in zip(*results, strict=True):
        assert ours.dtype == plain.dtype
        torch.testing.assert_close(ours, plain)


def test_one_token_trains_after_generation_in_inference_mode():
    """Its indices are shared by all calls, and tensors of inference mode cannot be kept for a backward pass."""
    routing_map, upstream, leaves = random_case(0, 1, 5, 0.7)
    backend = pick_backend("grouped_mm", DEVICE, torch.float32)
    with torch.inference_mode():
        generated = routed_experts(*leaves, Permutation.of(routing_map), backend)
    learnt = with_gradients(lambda *a: routed_experts(*a, Permutation.of(routing_map), backend), leaves, upstream)
    torch.testing.assert_close(learnt[0], generated)
    assert all(bool(gradient.any()) for gradient in learnt[1:])


@pytest.mark.parametrize(("hip", "capability", "picked"), [
    (None, (8, 0), "triton"), (None, (7, 5), "grouped_mm"), ("6.4", (9, 4), "grouped_mm"),
])  # fmt: skip
def test_cards_that_cannot_run_our_kernels_get_those_of_pytorch(monkeypatch, hip, capability, picked):
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    pick = pick_backend.__wrapped__
    assert pick("auto", torch.device("cuda", 0), torch.bfloat16).name == picked
    if picked != "triton":
        with pytest.raises(ConfigError, match=r"train\.moe_backend='triton': does not run on cuda:0; use auto"):
            pick("triton", torch.device("cuda", 0), torch.bfloat16)
