"""From the second pass of a step on, gradients of experts are added where they are summed."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dynmoe.ops import Permutation, pick_backend, routed_experts
from harness.memory import peak_bytes
from tests.ops.test_routed_experts import DEVICE, HIDDEN, NAMES, WIDTH, random_case

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


class Experts(nn.Module):
    """Two weights, and the passes of two micro-batches through them."""

    def __init__(self, name: str = "loop", dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.cases = [random_case(seed, 12, 4, 0.5) for seed in (0, 1)]
        for routing_map, _, _ in self.cases:
            routing_map[:, 2] = False  # an expert without tokens
        self.up, self.down = (nn.Parameter(leaf.to(dtype)) for leaf in self.cases[0][2][2:])
        self.backend = pick_backend(name, DEVICE, dtype)

    def output(self, case: int) -> torch.Tensor:
        routing_map, _, (x, gates, *_) = self.cases[case]
        x = x.to(self.up.dtype).requires_grad_()
        return routed_experts(x, gates, self.up, self.down, Permutation.of(routing_map), self.backend)

    def backward(self, case: int) -> None:
        self.output(case).backward(self.cases[case][1].to(self.up.dtype))

    def gradients(self, case: int) -> tuple[torch.Tensor, ...]:
        upstream = self.cases[case][1].to(self.up.dtype)
        return torch.autograd.grad(self.output(case), [self.up, self.down], upstream)


def assert_sums(experts: Experts, sums: list[torch.Tensor | None]) -> None:
    for total, *parts in zip(sums, experts.gradients(0), experts.gradients(1), strict=True):
        torch.testing.assert_close(total, sum(parts), **TOLERANCE)


@pytest.mark.parametrize("name", NAMES)
def test_the_second_pass_adds_to_the_first(name):
    experts = Experts(name)
    experts.backward(0)
    first = experts.up.grad
    version = first._version
    experts.backward(1)
    assert experts.up.grad is first
    assert first._version > version
    assert_sums(experts, [experts.up.grad, experts.down.grad])


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_adds_too(reentrant):
    experts = Experts()
    experts.backward(0)
    leaf = torch.zeros((), requires_grad=True)
    before = experts.up.grad
    y = checkpoint(lambda zero: experts.output(1) + zero, leaf, use_reentrant=reentrant)
    y.backward(experts.cases[1][1])
    assert experts.up.grad is before
    assert_sums(experts, [experts.up.grad, experts.down.grad])


def test_the_second_pass_holds_no_second_tensor_of_the_size_of_the_weights():
    """300 experts of 1 MB of weights in all, for few tokens."""
    routing_map = torch.zeros(4, 300, dtype=torch.bool)
    routing_map[:, 7] = True
    up, down = (nn.Parameter(torch.randn(300, *shape)) for shape in ((2 * WIDTH, HIDDEN), (HIDDEN, WIDTH)))
    permutation = Permutation.of(routing_map)
    backend = pick_backend("grouped_mm", torch.device("cpu"), torch.float32)

    def step() -> None:
        routed_experts(torch.randn(4, HIDDEN), routing_map.float(), up, down, permutation, backend).sum().backward()

    size = up.nbytes + down.nbytes
    assert peak_bytes(step) > size
    assert peak_bytes(step) < size / 10


@pytest.mark.parametrize("name", NAMES)
def test_gradients_that_were_asked_for_are_returned(name):
    """``autograd.grad`` neither writes to ``.grad`` nor misses a gradient."""
    experts = Experts(name)
    experts.backward(0)
    before = [experts.up.grad.clone(), experts.down.grad.clone()]
    asked = experts.gradients(1)
    assert all(bool(gradient.any()) for gradient in asked)
    assert all(torch.equal(*pair) for pair in zip(before, [experts.up.grad, experts.down.grad], strict=True))


def test_a_backward_pass_to_other_inputs_leaves_the_weights_alone():
    experts = Experts()
    experts.backward(0)
    before = experts.up.grad.clone()
    y = experts.output(1)
    y.backward(experts.cases[1][1], inputs=[experts.down])
    torch.testing.assert_close(experts.up.grad, before, rtol=0, atol=0)
    assert_sums(experts, [before + experts.gradients(1)[0], experts.down.grad])


def test_hooks_see_the_gradient_of_each_pass():
    experts = Experts()
    expected = experts.gradients(1)
    experts.backward(0)
    seen = []
    experts.up.register_hook(lambda gradient: seen.append(gradient.clone()))
    done = []
    experts.down.register_post_accumulate_grad_hook(lambda weight: done.append(weight.grad.clone()))
    experts.backward(1)
    torch.testing.assert_close(seen[0], expected[0], **TOLERANCE)
    torch.testing.assert_close(done[0], experts.down.grad, rtol=0, atol=0)
    assert_sums(experts, [experts.up.grad, experts.down.grad])


@pytest.mark.parametrize(
    ("name", "dtype"), [("grouped_mm", torch.bfloat16), ("loop", torch.bfloat16), ("triton", torch.float16)]
)
def test_a_buffer_of_megatron_gets_sums_in_fp32(name, dtype):
    """Half precision is fp16 for Triton: its interpreter multiplies bf16 as if it were integers."""
    experts = Experts(name, dtype)
    for weight in experts.parameters():
        weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)
        weight.adds_to_main_grad = True
    gradients = [[part.float() for part in experts.gradients(case)] for case in (0, 1)]
    for case in (0, 1):
        experts.backward(case)
    assert [weight.grad for weight in experts.parameters()] == [None, None]
    rounding = torch.finfo(dtype).eps if name == "triton" else 0.0  # the kernel adds what it has not rounded
    for weight, first, second in zip(experts.parameters(), *gradients, strict=True):
        error = (weight.main_grad - (first + second)).abs()
        assert (error <= rounding * (first.abs() + second.abs())).all()


@pytest.mark.parametrize("name", NAMES)
def test_frozen_weights_have_no_gradient_and_others_the_same(name):
    routing_map, upstream, leaves = random_case(0, 12, 4, 0.5)
    permutation = Permutation.of(routing_map)
    backend = pick_backend(name, DEVICE, torch.float32)
    found = []
    for frozen in (False, True):
        inputs = [leaf.clone().requires_grad_(not (frozen and place > 1)) for place, leaf in enumerate(leaves)]
        routed_experts(*inputs, permutation, backend).backward(upstream)
        assert (inputs[2].grad is None) == frozen
        found.append([inputs[0].grad, inputs[1].grad])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
