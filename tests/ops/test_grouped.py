from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from dynmoe.ops import Permutation, gather_rows, grouped, grouped_mm, linear_fp32, swiglu_experts

counts = st.lists(st.integers(0, 5), min_size=1, max_size=5)
WIDTH, HIDDEN = 8, 16


def offsets_of(tokens_per_expert):
    return torch.tensor(tokens_per_expert).cumsum(0).to(torch.int32)


@given(counts)
def test_grouped_products_equal_a_loop(tokens_per_expert):
    num_rows, num_experts = sum(tokens_per_expert), len(tokens_per_expert)
    rows, weights = torch.randn(num_rows, HIDDEN), torch.randn(num_experts, HIDDEN, WIDTH)
    groups = rows.split(tokens_per_expert)
    expected = torch.cat([group @ weight for group, weight in zip(groups, weights, strict=True)])
    torch.testing.assert_close(grouped_mm(rows, weights, offsets_of(tokens_per_expert)), expected)

    other = torch.randn(num_rows, WIDTH)
    parts = zip(groups, other.split(tokens_per_expert), strict=True)
    expected = torch.stack([group.t() @ part for group, part in parts])
    torch.testing.assert_close(grouped_mm(rows.t(), other, offsets_of(tokens_per_expert)), expected)


def experts_by_loop(rows, gates, w_up, w_down, tokens_per_expert):
    outputs = []
    for group, gate, up, down in zip(
        rows.split(tokens_per_expert), gates.split(tokens_per_expert), w_up, w_down, strict=True
    ):
        first, second = (group @ up.t()).chunk(2, dim=1)
        outputs.append(gate.unsqueeze(1) * (F.silu(first) * second @ down.t()))
    return torch.cat(outputs)


@given(counts, st.sampled_from([1, 1 << 18]))
def test_experts_and_all_gradients_equal_a_loop(tokens_per_expert, chunk):
    num_rows, num_experts = sum(tokens_per_expert), len(tokens_per_expert)
    leaves = [
        torch.randn(num_rows, HIDDEN), torch.rand(num_rows),
        torch.randn(num_experts, 2 * WIDTH, HIDDEN) * 0.3, torch.randn(num_experts, HIDDEN, WIDTH) * 0.3,
    ]  # fmt: skip
    upstream = torch.randn(num_rows, HIDDEN)
    results = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouped, "_CHUNK_ELEMENTS_CPU", chunk)
        for compute, last in ((swiglu_experts, torch.tensor(tokens_per_expert)), (experts_by_loop, tokens_per_expert)):
            inputs = [leaf.clone().requires_grad_() for leaf in leaves]
            output = compute(*inputs, last)
            output.backward(upstream)
            results.append([output.detach(), *(leaf.grad for leaf in inputs)])
    for ours, oracle in zip(*results, strict=True):
        torch.testing.assert_close(ours, oracle, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("density", [0.0, 0.4, 1.0])
def test_tokens_copied_inside_equal_rows_copied_before(density):
    generator = torch.Generator().manual_seed(0)
    permutation = Permutation.of(torch.rand(9, 3, generator=generator) < density)
    num_rows = len(permutation.token_N)
    upstream, gates = torch.randn(num_rows, HIDDEN), torch.rand(num_rows)
    results = []
    for inside in (True, False):
        torch.manual_seed(1)
        leaves = [torch.randn(9, HIDDEN), torch.randn(3, 2 * WIDTH, HIDDEN), torch.randn(3, HIDDEN, WIDTH)]
        x, w_up, w_down = (leaf.requires_grad_() for leaf in leaves)
        source = x if inside else gather_rows(x, permutation)
        y = swiglu_experts(
            source, gates, w_up, w_down, permutation.tokens_per_expert_E, permutation if inside else None
        )
        y.backward(upstream)
        results.append([y.detach(), x.grad, w_up.grad, w_down.grad])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_logits_in_fp32_of_bf16_operands():
    x, weight = torch.randn(5, HIDDEN).bfloat16(), torch.randn(3, HIDDEN).bfloat16()
    upstream, results = torch.randn(5, 3), []
    for compute in (linear_fp32, lambda x, w: F.linear(x.float(), w.float())):
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        y = compute(*leaves)
        y.backward(upstream)
        results.append([y.detach(), *(leaf.grad for leaf in leaves)])
    for ours, plain in zip(*results, strict=True):
        assert ours.dtype == plain.dtype
        torch.testing.assert_close(ours, plain)


def test_only_rows_and_up_projection_are_saved():
    tokens_per_expert, saved = [40, 24], []
    rows = torch.randn(64, HIDDEN, requires_grad=True)
    gates, w_up = torch.rand(64, requires_grad=True), torch.randn(2, 2 * WIDTH, HIDDEN, requires_grad=True)
    w_down = torch.randn(2, HIDDEN, WIDTH, requires_grad=True)

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        swiglu_experts(rows, gates, w_up, w_down, torch.tensor(tokens_per_expert))
    own = {id(t) for t in (w_up, w_down)}
    activations = sum(t.numel() for t in saved if id(t) not in own)
    assert activations == 64 * HIDDEN + 64 * 2 * WIDTH + 64 + 2  # rows, h, gates, offsets


def test_bf16_stays_close_to_fp32():
    torch.manual_seed(0)
    arguments = [
        torch.randn(64, HIDDEN),
        torch.rand(64),
        torch.randn(2, 2 * WIDTH, HIDDEN),
        torch.randn(2, HIDDEN, WIDTH),
    ]
    exact = swiglu_experts(*arguments, torch.tensor([30, 34]))
    rows, gates, w_up, w_down = arguments
    low = swiglu_experts(rows.bfloat16(), gates, w_up.bfloat16(), w_down.bfloat16(), torch.tensor([30, 34]))
    assert low.dtype == torch.bfloat16
    assert ((low.float() - exact).norm() / exact.norm()).item() < 0.01
