"""Routers beside the two papers', each against its definition, token by token."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynmoe.routing import RoutingCounts, expert_threshold, losses, null_experts, relu, sigmoid_cutoff, top_k
from dynmoe.routing.histogram import NUM_BINS, kth_largest, move_cutoffs, score_histogram
from dynmoe.routing.null_experts import null_balance
from dynmoe.routing.relu import adapt_l1
from tests import oracles
from tests.routing.test_routers import chosen_sets, random_logits, seeds, sizes


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


@given(seeds, sizes, st.floats(0.05, 0.95), st.integers(0, 3), st.one_of(st.none(), st.integers(1, 4)), st.booleans())
def test_sigmoid_passes_its_cutoff_between_floor_and_ceiling(seed, shape, cutoff, low, high, renormalize):
    low = min(low, shape[1])
    if high is not None and high < low:
        low, high = high, low
    logits = random_logits(seed, shape)
    plan = sigmoid_cutoff(logits, cutoff, renormalize=renormalize, min_experts=low, max_experts=high)
    rows = plan.scores_TE.tolist()
    margins = (plan.scores_TE - cutoff).tolist()
    expected = [oracles.top_any_choice(row, [True] * shape[1], low, high) for row in margins]
    assert chosen_sets(plan) == expected
    assert plan.unclaimed_T.tolist() == [all(margin <= 0 for margin in row) for row in margins]
    for token, experts in enumerate(expected):
        total = sum(rows[token][e] for e in experts) if renormalize else 1.0
        for expert in range(shape[1]):
            gate = rows[token][expert] / total if expert in experts else 0.0
            assert plan.gates_TE[token, expert].item() == pytest.approx(gate, rel=1e-5)
            assert rows[token][expert] == pytest.approx(sigmoid(logits[token, expert].item()), rel=1e-5)


@given(seeds, sizes, st.one_of(st.none(), st.integers(1, 4)))
def test_relu_takes_the_positive_logits_as_gates(seed, shape, high):
    logits = random_logits(seed, shape).requires_grad_()
    plan = relu(logits, max_experts=high)
    for token, row in enumerate(logits.tolist()):
        best = oracles.descending(row)[: shape[1] if high is None else high]
        chosen = {expert for expert in best if row[expert] > 0}
        assert chosen_sets(plan)[token] == chosen
        assert plan.gates_TE[token].tolist() == [value if e in chosen else 0.0 for e, value in enumerate(row)]
    plan.gates_TE.sum().backward()
    assert torch.equal(logits.grad, plan.routing_map_TE.float())


@given(seeds, sizes, st.integers(1, 4), st.data(), st.booleans())
def test_null_experts_take_slots_and_nothing_else(seed, shape, num_null, data, renormalize):
    total = shape[1] + num_null
    k = data.draw(st.integers(1, total))
    logits = random_logits(seed, (shape[0], total))
    plan = null_experts(logits, k, num_null, renormalize=renormalize)
    probs = torch.softmax(logits, dim=1)
    for token, row in enumerate(probs.tolist()):
        chosen = {expert for expert in oracles.top_k_choice(row, k) if expert < shape[1]}
        assert chosen_sets(plan)[token] == chosen
        scale = sum(row[e] for e in chosen) if renormalize and chosen else 1.0
        expected = [row[e] / scale if e in chosen else 0.0 for e in range(shape[1])]
        assert plan.gates_TE[token].tolist() == pytest.approx(expected, rel=1e-5)
        assert bool(plan.unclaimed_T[token]) == (not chosen)
    # The loss over all X experts, the load of the null ones averaged (AdaMoE, section 3.3), one expert at a time.
    if shape[0]:
        picked = top_k(logits, k)
        load = picked.routing_map_TE.double().mean(dim=0) / k
        load[shape[1] :] = load[shape[1] :].mean()
        expected = total * float((load * probs.double().mean(dim=0)).sum())
        assert null_balance(plan, k, num_null).item() == pytest.approx(expected, rel=1e-4)


@given(seeds, sizes)
def test_expert_threshold_compares_each_expert_with_its_own_cutoff(seed, shape):
    logits = random_logits(seed, shape)
    cutoffs = torch.rand(shape[1], generator=torch.Generator().manual_seed(seed))
    plan = expert_threshold(logits, cutoffs)
    for token, row in enumerate(plan.scores_TE.tolist()):
        assert chosen_sets(plan)[token] == {e for e, score in enumerate(row) if score > cutoffs[e].item()}
    assert torch.equal(plan.gates_TE, plan.scores_TE * plan.routing_map_TE)


@given(seeds, st.integers(1, 40), st.integers(1, 4), st.data(), st.integers(1, 3))
def test_the_kth_largest_comes_from_counts_of_parts(seed, tokens, experts, data, parts):
    """Counts may be summed over ranks; the answer is exact to the width of a bin."""
    scores = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(seed))
    k = data.draw(st.integers(1, tokens))
    counts = sum(score_histogram(part) for part in scores.chunk(parts))
    assert int(counts.sum()) == tokens * experts
    found = kth_largest(counts.double(), torch.tensor(float(k)))
    exact = scores.sort(dim=0, descending=True).values[k - 1].double()
    assert ((found - exact).abs() <= 1 / NUM_BINS).all()


def test_cutoffs_follow_slowly():
    cutoffs = torch.tensor([0.5, 0.2])
    for _ in range(2):
        cutoffs = move_cutoffs(cutoffs, torch.tensor([0.9, 0.2]), decay=0.75)
    assert cutoffs.tolist() == pytest.approx([0.9 - 0.4 * 0.75**2, 0.2])


def test_the_l1_coefficient_grows_while_too_many_experts_are_used():
    start = torch.tensor(1e-8)
    assert adapt_l1(start, torch.tensor(3.0), 2.0).item() == pytest.approx(1.2e-8)
    assert adapt_l1(start, torch.tensor(1.0), 2.0).item() == pytest.approx(1e-8 / 1.2)
    assert adapt_l1(start, torch.tensor(2.0), 2.0).item() == pytest.approx(1e-8)


def test_l1_of_a_worked_example():
    # Three tokens, two experts, target 1. Expert 0 has two of them, expert 1 one: f = 2/1 * [2/3, 1/3].
    plan = relu(torch.tensor([[1.0, -1.0], [3.0, -2.0], [-1.0, 2.0]]))
    # Mean scores: [4/3, 2/3].
    assert losses.l1(plan, 1.0).item() == pytest.approx(4 / 3 * 4 / 3 + 2 / 3 * 2 / 3)


@given(seeds, st.integers(1, 4), st.integers(1, 5), st.booleans())
def test_sequence_balance_is_the_mean_over_sequences(seed, sequences, length, per_route):
    logits = random_logits(seed, (sequences * length, 5))
    plan = top_k(logits, 2)
    whole = losses.sequence_balance(plan, losses.sequence_counts(plan, sequences), per_route=per_route)
    parts = [losses.load_balance(top_k(part, 2), per_route=per_route) for part in logits.split(length)]
    torch.testing.assert_close(whole, torch.stack(parts).mean())


@given(seeds, st.integers(1, 3), st.booleans())
def test_sequence_balance_does_not_depend_on_how_sequences_are_spread(seed, sequences, per_route):
    logits = random_logits(seed, (sequences, 6, 5))
    whole = top_k(logits.flatten(0, 1), 2)
    counts_BE = losses.sequence_counts(whole, sequences)
    halves = [top_k(part.flatten(0, 1), 2) for part in logits.split(3, dim=1)]
    assert torch.equal(sum(losses.sequence_counts(half, sequences) for half in halves), counts_BE)
    spread = [losses.sequence_balance(half, counts_BE, 2, per_route=per_route) for half in halves]
    expected = losses.sequence_balance(whole, counts_BE, per_route=per_route)
    torch.testing.assert_close(torch.stack(spread).mean(), expected)


def test_sequences_must_divide_the_tokens():
    with pytest.raises(ValueError, match="num_sequences=2"):
        losses.sequence_counts(top_k(torch.zeros(3, 4), 1), 2)


@given(seeds, st.sampled_from(["relu", "null"]), st.integers(1, 11))
def test_their_losses_do_not_depend_on_the_split(seed, kind, cut):
    def loss(part, counts=None):
        plan = relu(part) if kind == "relu" else null_experts(part, 2, 2)
        return plan, losses.l1(plan, 1.5, counts) if kind == "relu" else null_balance(plan, 2, 2, counts)

    values = random_logits(seed, (12, 6))
    whole = values.clone().requires_grad_()
    split = values.clone().requires_grad_()
    loss(whole)[1].backward()
    parts = [split[:cut], split[cut:]]
    own = [RoutingCounts.of(loss(part)[0]) for part in parts]
    counts = RoutingCounts(
        sum(c.selected_E for c in own), sum(c.num_tokens for c in own), sum(c.num_routed_tokens for c in own), 2
    )
    torch.stack([loss(part, counts)[1] for part in parts]).mean().backward()
    torch.testing.assert_close(split.grad, whole.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: sigmoid_cutoff(torch.zeros(1, 4), 1.0), "cutoff=1.0"),
        (lambda: sigmoid_cutoff(torch.zeros(1, 4), 0.5, min_experts=5), "min_experts=5"),
        (lambda: relu(torch.zeros(1, 4), max_experts=0), "max_experts=0"),
        (lambda: null_experts(torch.zeros(1, 4), 2, 4), "num_null=4"),
        (lambda: null_experts(torch.zeros(1, 4), 5, 1), "k=5"),
    ],
)
def test_numbers_out_of_range_are_named(call, named):
    with pytest.raises(ValueError, match=named):
        call()
