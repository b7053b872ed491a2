"""The three routers against their definitions, token by token."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dynmoe.routing import RoutingPlan, top_any, top_k, top_p
from dynmoe.routing.top_any import cosines
from tests import oracles

seeds = st.integers(0, 2**31)
sizes = st.tuples(st.integers(0, 9), st.integers(1, 12))


def random_logits(seed: int, shape: tuple[int, int], spread: float = 2.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * spread


def chosen_sets(plan: RoutingPlan) -> list[set[int]]:
    return [set(row.nonzero().flatten().tolist()) for row in plan.routing_map_TE]


def check_softmax_gates(plan: RoutingPlan, renormalize: bool) -> None:
    expected = plan.scores_TE * plan.routing_map_TE
    if renormalize:
        expected = expected / expected.sum(dim=1, keepdim=True)
    torch.testing.assert_close(plan.gates_TE, expected)
    assert plan.gates_TE.dtype == torch.float32
    assert (plan.gates_TE[~plan.routing_map_TE] == 0).all()


@given(seeds, sizes, st.data(), st.booleans())
def test_top_k_is_the_k_best(seed, shape, data, renormalize):
    k = data.draw(st.integers(1, shape[1]))
    plan = top_k(random_logits(seed, shape), k, renormalize=renormalize)
    assert chosen_sets(plan) == [oracles.top_k_choice(row, k) for row in plan.scores_TE.tolist()]
    check_softmax_gates(plan, renormalize)


@given(seeds, sizes, st.floats(0.01, 1.0), st.sampled_from(["paper", "released"]), st.booleans(), st.data())
def test_top_p_is_the_shortest_prefix(seed, shape, p, variant, renormalize, data):
    low = data.draw(st.integers(1, shape[1]))
    high = data.draw(st.one_of(st.none(), st.integers(low, shape[1])))
    plan = top_p(
        random_logits(seed, shape), p, variant=variant, renormalize=renormalize, min_experts=low, max_experts=high
    )
    assert chosen_sets(plan) == [oracles.top_p_choice(row, p, variant, low, high) for row in plan.scores_TE.tolist()]
    check_softmax_gates(plan, renormalize)


@given(seeds, sizes, st.sampled_from(["top_k", "top_p"]), st.booleans())
def test_gates_have_the_gradient_of_their_definition(seed, shape, kind, renormalize):
    """One token at a time: softmax, the oracle's choice, and the renormalisation, all by autograd on scalars."""
    logits = random_logits(seed, shape).requires_grad_()
    upstream = random_logits(seed + 1, shape)
    if kind == "top_k":
        plan = top_k(logits, 1 + shape[1] // 2, renormalize=renormalize)
    else:
        plan = top_p(logits, 0.6, renormalize=renormalize)
    (plan.gates_TE * upstream).sum().backward()
    for token in range(shape[0]):
        own = logits.detach()[token].double().requires_grad_()
        probs = own.exp() / own.exp().sum()
        choice = probs.float().tolist()
        experts = oracles.top_k_choice(choice, 1 + shape[1] // 2)
        if kind == "top_p":
            experts = oracles.top_p_choice(choice, 0.6, "paper")
        total = sum(probs[e] for e in experts) if renormalize else 1.0
        sum(upstream[token, e].double() * probs[e] / total for e in experts).backward()
        torch.testing.assert_close(logits.grad[token].double(), own.grad, rtol=1e-4, atol=1e-5)


@given(seeds, st.integers(1, 6), st.integers(1, 5), st.sampled_from(["paper", "released"]))
def test_top_any_has_the_gradient_of_its_definition(seed, tokens, experts, variant):
    """Gate = step / K with K a constant, and the step passes the gradient: to all (paper), to s > g (released)."""
    inputs = top_any_inputs(seed, tokens, experts)
    hidden, prototypes, thresholds = (tensor.clone().requires_grad_() for tensor in inputs[:3])
    active = inputs[3]
    upstream = random_logits(seed + 1, (tokens, experts))
    plan = top_any(hidden, prototypes, thresholds, active, variant=variant, min_experts=0)
    (plan.gates_TE * upstream).sum().backward()
    own = [tensor.double().clone().requires_grad_() for tensor in inputs[:3]]
    total = torch.zeros((), dtype=torch.float64)
    for token in range(tokens):
        chosen = plan.routing_map_TE[token]
        for expert in range(experts):
            x = own[0][token]
            w = own[1][:, expert]
            score = torch.sigmoid((x @ w) / (x.norm() * w.norm())) * active[expert]
            margin = score - torch.sigmoid(own[2][expert])
            if variant == "paper" or chosen[expert]:
                total = total + upstream[token, expert] * margin / max(1, int(chosen.sum()))
    if total.requires_grad:
        total.backward()
    for ours, definition in zip((hidden, prototypes, thresholds), own, strict=True):
        expected = torch.zeros_like(definition) if definition.grad is None else definition.grad
        torch.testing.assert_close(ours.grad.double(), expected, rtol=1e-4, atol=1e-6)


def test_top_p_forms_differ_on_exact_hits_only():
    logits = torch.zeros(1, 4)  # four times 1/4: two of them reach 1/2 exactly
    assert chosen_sets(top_p(logits, 0.5, variant="paper")) == [{0, 1}]
    assert chosen_sets(top_p(logits, 0.5, variant="released")) == [{0, 1, 2}]
    assert chosen_sets(top_p(logits, 0.4, variant="paper")) == chosen_sets(top_p(logits, 0.4, variant="released"))


def test_ties_go_to_the_lower_expert_index():
    assert chosen_sets(top_k(torch.zeros(2, 6), 2)) == [{0, 1}] * 2
    assert chosen_sets(top_p(torch.zeros(1, 8), 0.25)) == [{0, 1}]


def test_p_of_one_selects_every_expert():
    logits = torch.tensor([[50.0, 0.0, -50.0, -90.0]])
    assert chosen_sets(top_p(logits, 1.0)) == [{0, 1, 2, 3}]


def test_an_expert_of_minus_infinity_has_no_weight_and_a_finite_gradient():
    logits = torch.tensor([[1.0, float("-inf"), 0.5]], requires_grad=True)
    plan = top_p(logits, 0.95)
    assert chosen_sets(plan) == [{0, 2}]
    plan.gates_TE.sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def top_any_inputs(seed: int, tokens: int, experts: int, width: int = 8):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=generator)
    prototypes = torch.randn(width, experts, generator=generator)
    thresholds = torch.randn(experts, generator=generator) * 0.3
    active = torch.rand(experts, generator=generator) < 0.7
    active[int(torch.randint(experts, (1,), generator=generator))] = True
    return hidden, prototypes, thresholds, active


@given(seeds, sizes, st.integers(0, 3), st.one_of(st.none(), st.integers(1, 4)), st.floats(0.5, 8.0))
def test_top_any_passes_thresholds_between_floor_and_ceiling(seed, shape, low, high, scale):
    if high is not None and high < low:
        low, high = high, low
    low = min(low, shape[1])
    hidden, prototypes, thresholds, active = top_any_inputs(seed, *shape)
    plan = top_any(
        hidden, prototypes, thresholds, active, variant="paper", scale=scale, min_experts=low, max_experts=high
    )
    margins = (cosines(hidden, prototypes) - thresholds).tolist()
    expected = [oracles.top_any_choice(row, active.tolist(), low, high) for row in margins]
    assert chosen_sets(plan) == expected
    for token, experts in enumerate(expected):
        for expert in range(shape[1]):
            gate = 1 / len(experts) if expert in experts else 0.0
            assert plan.gates_TE[token, expert].item() == pytest.approx(gate)


@given(seeds, st.integers(1, 9), st.integers(1, 6), st.booleans())
def test_score_weights_are_the_scores_of_the_chosen(seed, tokens, experts, renormalize):
    inputs = [tensor.clone() for tensor in top_any_inputs(seed, tokens, experts)]
    for tensor in inputs[:3]:
        tensor.requires_grad_()
    plan = top_any(*inputs, weights="score", renormalize=renormalize, scale=3.0)
    expected = plan.scores_TE * plan.routing_map_TE
    if renormalize:
        expected = expected / expected.sum(dim=1, keepdim=True)
    torch.testing.assert_close(plan.gates_TE, expected)
    # The choice is a constant in the sum: an expert that is not chosen hears of its own gate alone.
    upstream = random_logits(seed + 1, (tokens, experts))
    only_chosen = upstream * plan.routing_map_TE
    (gradient,) = torch.autograd.grad((plan.gates_TE * only_chosen).sum(), inputs[2], retain_graph=True)
    assert (gradient[~plan.routing_map_TE.any(dim=0)] == 0).all()
    (plan.gates_TE * upstream).sum().backward()
    assert (inputs[2].grad[inputs[3]] != 0).all()
    assert (inputs[2].grad[~inputs[3]] == 0).all() or not renormalize


@pytest.mark.parametrize("variant", ["paper", "released"])
@pytest.mark.parametrize("training", [True, False])
def test_one_expert_and_all_masked_but_one(variant, training):
    hidden, prototypes, thresholds, _ = top_any_inputs(3, 20, 5)
    for expert in range(5):
        only = torch.arange(5) == expert
        plan = top_any(hidden, prototypes, thresholds, only, variant=variant, training=training)
        assert not plan.routing_map_TE[:, ~only].any()
        passes = plan.scores_TE[:, expert] > torch.sigmoid(thresholds[expert])
        served = passes if variant == "released" and training else torch.ones(20, dtype=torch.bool)
        assert torch.equal(plan.routing_map_TE[:, expert], served)
        assert torch.equal(plan.unclaimed_T, ~passes)
        alone = top_any(
            hidden, prototypes[:, [expert]], thresholds[[expert]], torch.ones(1), variant=variant, training=training
        )
        assert torch.equal(alone.gates_TE[:, 0], plan.gates_TE[:, expert])


def test_ties_of_scores_go_to_the_lower_expert_index():
    same = torch.ones(3, 4)  # four equal prototypes
    plan = top_any(torch.ones(2, 3), same, torch.zeros(4), torch.tensor([0, 1, 1, 1]), max_experts=2)
    assert chosen_sets(plan) == [{1, 2}] * 2
    plan = top_any(torch.ones(2, 3), same, torch.full((4,), 9.0), torch.tensor([0, 1, 1, 1]))
    assert chosen_sets(plan) == [{1}] * 2


@given(seeds, sizes, st.data())
def test_a_bias_chooses_and_does_not_weigh(seed, shape, data):
    k = data.draw(st.integers(1, shape[1]))
    logits = random_logits(seed, shape)
    bias = torch.randn(shape[1], generator=torch.Generator().manual_seed(seed)) * 0.3
    plan = top_k(logits, k, bias_E=bias)
    biased = (torch.softmax(logits, dim=1) + bias).tolist()
    assert chosen_sets(plan) == [oracles.top_k_choice(row, k) for row in biased]
    check_softmax_gates(plan, renormalize=False)


def test_released_top_any_lets_a_token_select_nobody_only_in_training():
    hidden = torch.tensor([[1.0, 0.0]])
    prototypes = torch.tensor([[-1.0, -0.5], [0.0, 0.1]])
    active = torch.ones(2, dtype=torch.bool)
    arguments = (hidden, prototypes, torch.ones(2), active)
    assert chosen_sets(top_any(*arguments, variant="released", training=True)) == [set()]
    plan = top_any(*arguments, variant="released", training=False)
    assert chosen_sets(plan) == [{1}]
    assert plan.gates_TE.tolist() == [[0.0, 1.0]]


def test_straight_through_gradients_of_both_forms():
    # One token, two experts: the first passes its threshold, the second does not.
    hidden = torch.tensor([[1.0, 0.0]])
    prototypes = torch.tensor([[1.0, -1.0], [0.0, 1.0]])
    for variant, reaches_the_second in (("paper", True), ("released", False)):
        thresholds = torch.zeros(2, requires_grad=True)
        plan = top_any(hidden, prototypes, thresholds, torch.ones(2, dtype=torch.bool), variant=variant)
        assert chosen_sets(plan) == [{0}]
        (plan.gates_TE * torch.tensor([2.0, 3.0])).sum().backward()
        # d gate / d threshold = -(1/K) * sigmoid'(0) = -1/4, times what comes from above.
        expected = [-0.5, -0.75 if reaches_the_second else 0.0]
        assert thresholds.grad is not None
        assert thresholds.grad.tolist() == pytest.approx(expected)


def test_top_any_tells_experts_apart_whose_scores_are_all_1():
    """At a hidden size of 4096, where the factor on cosines is 64."""
    hidden = torch.eye(3)[:1]
    prototypes = torch.tensor([[0.9, 0.8, 0.7], [0.4, 0.6, 0.7], [0.0, 0.0, 0.0]])
    for thresholds, chosen in (([0.95, 0.79, 0.6], {1, 2}), ([0.95, 0.9, 0.9], {0})):
        plan = top_any(hidden, prototypes, torch.tensor(thresholds), torch.ones(3, dtype=torch.bool), scale=64.0)
        assert (plan.scores_TE == 1).all()
        assert chosen_sets(plan) == [chosen]


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: top_k(torch.zeros(1, 4), 5), "k=5"),
        (lambda: top_k(torch.zeros(1, 4), 0), "k=0"),
        (lambda: top_p(torch.zeros(1, 4), 0.0), "p=0.0"),
        (lambda: top_p(torch.zeros(1, 4), 1.5), "p=1.5"),
        (lambda: top_p(torch.zeros(1, 4), float("nan")), "p=nan"),
        (lambda: top_p(torch.zeros(1, 4), 0.5, variant="other"), "variant='other'"),
        (
            lambda: top_p(torch.zeros(1, 4), 0.5, min_experts=3, max_experts=2),
            "max_experts=2 must be at least 1 and min_experts (3)",
        ),
        (
            lambda: top_any(*top_any_inputs(0, 1, 4), min_experts=3, max_experts=2),
            "max_experts=2 must be at least 1 and min_experts (3)",
        ),
        (lambda: top_any(*top_any_inputs(0, 1, 4)[:3], torch.zeros(4)), "active_E disables all 4 experts"),
        (lambda: top_any(*top_any_inputs(0, 1, 4), weights="soft"), "weights='soft'"),
        (lambda: top_any(*top_any_inputs(0, 1, 4), straight_through="some"), "straight_through='some'"),
        (lambda: top_any(*top_any_inputs(0, 1, 4), variant="improved"), "variant='improved'"),
        (lambda: top_p(torch.zeros(1, 4), 0.5, min_experts=0), "min_experts=0"),
    ],
)
def test_numbers_out_of_range_are_named(call, named):
    with pytest.raises(ValueError, match=re.escape(named)):
        call()
