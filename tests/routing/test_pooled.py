"""Routers that select among the pairs of many tokens, against loops over sorted lists of pairs."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynmoe.routing.expert_race import race_plan, router_similarity, selected_together
from dynmoe.routing.histogram import NUM_BINS, score_histogram
from dynmoe.routing.pooled import (
    best_of_batch,
    best_of_sequences,
    contested,
    odds_of_uniform,
    passing,
    pool_cutoff,
    squeezed,
)
from dynmoe.routing.resonance import (
    affinities,
    chosen_by_both,
    chosen_by_tokens,
    equal_capacity,
    resonance_cutoffs,
)
from dynmoe.routing.scope import TokenScope
from tests import oracles
from tests.moe.cases import race_over_ranks
from tests.routing.test_routers import random_logits, seeds

limits = st.sampled_from([(0, None), (1, None), (0, 2), (1, 3), (2, 2)])


def best(pairs: list[tuple[float, int, int]], count: int, low: int, high: int | None) -> set[tuple[int, int]]:
    """The ``count`` best (value, token, expert): first every token's best ``low``, none beyond its best ``high``."""
    rank = {}
    for token in {token for _, token, _ in pairs}:
        own = sorted((-value, expert) for value, at, expert in pairs if at == token)
        rank |= {(token, expert): place for place, (_, expert) in enumerate(own)}
    key = {(token, expert): (rank[token, expert] >= low, -value, token, expert) for value, token, expert in pairs}
    allowed = [pair for pair in key if high is None or rank[pair] < high]
    return set(sorted(allowed, key=key.__getitem__)[:count])


def pairs_of(values: torch.Tensor) -> list[tuple[float, int, int]]:
    return [(v, token, expert) for token, row in enumerate(values.tolist()) for expert, v in enumerate(row)]


def chosen(map_TE: torch.Tensor) -> set[tuple[int, int]]:
    return {(token, expert) for token, expert in map_TE.nonzero().tolist()}


@given(seeds, st.integers(1, 3), st.integers(1, 7), limits, st.floats(0, 1), st.booleans())
def test_the_best_pairs_of_each_sequence(seed, sequences, length, bounds, share, ties):
    low, high = bounds
    experts = 4
    per_token = low + share * ((experts if high is None else high) - low)
    logits = random_logits(seed, (sequences * length, experts))
    values = odds_of_uniform((logits.round() if ties else logits).softmax(dim=1))
    found = best_of_sequences(contested(values, low, high), per_token, TokenScope(sequences))
    assert found.sum() == sequences * round(length * per_token)
    for sequence, part in enumerate(values.split(length)):
        expected = best(pairs_of(part), round(length * per_token), low, high)
        assert chosen(found[sequence * length : (sequence + 1) * length]) == expected


@given(seeds, st.integers(1, 20), limits, st.floats(0, 1))
def test_the_best_pairs_of_a_batch(seed, tokens, bounds, share):
    low, high = bounds
    experts = 5
    per_token = low + share * ((experts if high is None else high) - low)
    values = contested(squeezed(random_logits(seed, (tokens, experts))), low, high)
    found = best_of_batch(values, per_token, TokenScope())
    assert chosen(found) == best(pairs_of(squeezed(random_logits(seed, (tokens, experts)))), round(tokens * per_token),
                                 low, high)  # fmt: skip


def test_pairs_as_good_as_the_last_one_of_a_batch_are_selected_too():
    values = torch.tensor([[0.5, 0.25], [0.5, 0.125]])
    assert best_of_batch(values, 0.5, TokenScope()).tolist() == [[True, False], [True, False]]
    assert best_of_batch(values, 1.5, TokenScope()).tolist() == [[True, True], [True, False]]
    assert best_of_sequences(values, 0.5, TokenScope(1)).tolist() == [[True, False], [False, False]]
    assert not best_of_batch(values, 0.0, TokenScope()).any()
    assert not best_of_batch(values[:0], 1.0, TokenScope()).any()


@pytest.mark.parametrize("tokens", [[40, 40], [7, 0], [0, 0]])
def test_the_ranks_of_a_batch_select_what_one_rank_would(two_ranks, tokens):
    for found, expected, elements in two_ranks.run(race_over_ranks, tokens):
        assert found == expected
        assert elements == 3 * [1024], "the communication must not depend on the number of tokens"


def test_strengths_keep_the_order_and_fit_into_a_histogram():
    logits = torch.tensor([[-1e4, -20.0, -1.0, 0.0, 1.0, 20.0, 1e4]])
    for strength in (squeezed(logits), odds_of_uniform(logits[:, 1:5].softmax(dim=1))):
        assert (strength.diff() > 0).all()
        assert strength.min() >= 0
        assert strength.max() <= 1
    assert squeezed(torch.zeros(1)) == odds_of_uniform(torch.full((1, 7), 1 / 7))[0, 0] == 0.5


@given(seeds, limits, st.floats(0.1, 0.9), st.integers(1, 3))
def test_the_cutoff_of_a_pool_selects_as_many_pairs(seed, bounds, share, parts):
    """To the pairs of one bin, whose counts may be summed over ranks."""
    low, high = bounds
    per_token = low + share * ((6 if high is None else high) - low)
    values = contested(odds_of_uniform(random_logits(seed, (300, 6)).softmax(dim=1)), low, high)
    histogram = sum(score_histogram(part) for part in values.chunk(parts))
    cutoff = pool_cutoff(histogram, torch.tensor(300 * per_token))
    near = ((values - cutoff).abs() <= 1 / NUM_BINS).sum()
    assert abs(int(passing(values, cutoff).sum()) - 300 * per_token) <= near + 1


def test_without_a_cutoff_pairs_better_than_none_pass():
    logits = torch.tensor([[1.0, -1.0, 0.5], [-1.0, -2.0, -0.5]])
    unknown = torch.tensor(0.0)
    assert passing(squeezed(logits), unknown).tolist() == (logits > 0).tolist()
    probs = logits.softmax(dim=1)
    assert passing(odds_of_uniform(probs), unknown).tolist() == (probs > 1 / 3).tolist()
    assert passing(contested(squeezed(logits), 1, None), unknown).any(dim=1).all()


@given(seeds)
def test_race_gates_are_the_logits(seed):
    logits = random_logits(seed, (6, 4)).requires_grad_()
    map_TE = best_of_batch(squeezed(logits.detach()), 1.5, TokenScope())
    plan = race_plan(logits, map_TE)
    assert plan.gates_TE.tolist() == [
        [value if on else 0.0 for value, on in zip(*rows, strict=True)]
        for rows in zip(logits.tolist(), map_TE.tolist(), strict=True)
    ]
    plan.gates_TE.sum().backward()
    assert torch.equal(logits.grad, map_TE.float())


@given(seeds, st.integers(1, 9), st.integers(2, 5))
def test_router_similarity_pair_by_pair(seed, tokens, experts):
    scores = random_logits(seed, (tokens, experts)).softmax(dim=1)
    rows = (random_logits(seed + 1, (tokens, experts)) > 0).tolist()
    together = [[sum(row[i] and row[j] for row in rows) for j in range(experts)] for i in range(experts)]
    own = sum(together[i][i] for i in range(experts))
    other = sum(map(sum, together)) - own
    expected = 0.0
    for i in range(experts):
        for j in range(experts):
            total, pairs = (own, experts) if i == j else (other, experts * (experts - 1))
            weight = pairs * together[i][j] / max(total, 1)
            expected += weight * sum(row[i] * row[j] for row in scores.tolist()) / tokens
    found = router_similarity(scores, selected_together(torch.tensor(rows)))
    assert found.item() == pytest.approx(expected, rel=1e-5, abs=1e-7)


def test_router_similarity_is_one_for_uniform_scores():
    every = selected_together(torch.ones(5, 4, dtype=torch.bool))
    assert router_similarity(torch.full((5, 4), 0.25), every).item() == pytest.approx(1.0)


def cosine(first: list[float], second: list[float]) -> float:
    product = sum(a * b for a, b in zip(first, second, strict=True))
    return product / math.hypot(*first) / math.hypot(*second)


@given(seeds, st.integers(1, 6), st.integers(1, 5), st.integers(0, 5))
def test_affinity_is_the_cosine_with_an_experts_own_features(seed, tokens, experts, more):
    width = experts + more
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=generator)
    weight = torch.rand(width, generator=generator) + 0.1
    found = affinities(x, weight, experts)
    for expert in range(experts):
        own = [
            w if expert * width <= j * experts < (expert + 1) * width else 0.0 for j, w in enumerate(weight.tolist())
        ]
        for token, row in enumerate(x.tolist()):
            assert found[token, expert].item() == pytest.approx(cosine(row, own), abs=1e-5)


@given(seeds, st.integers(1, 3), st.integers(1, 8), st.integers(1, 5), st.floats(0, 1))
def test_experts_take_turns_among_the_tokens_that_chose_them(seed, sequences, length, k, share):
    experts = 5
    affinity = torch.rand(sequences * length, experts, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    wanted = round(length * k * share)
    values = chosen_by_tokens(affinity, k)
    found = chosen_by_both(values, wanted / length, TokenScope(sequences))
    for sequence, part in enumerate(affinity.split(length)):
        waiting = [[] for _ in range(experts)]
        for token, row in enumerate(part.tolist()):
            for expert in oracles.top_k_choice(row, k):
                waiting[expert].append((row[expert], token))
        for queue in waiting:
            queue.sort(key=lambda one: (-one[0], one[1]))
        expected = set()
        while len(expected) < wanted:
            turn = [(queue.pop(0), expert) for expert, queue in enumerate(waiting) if queue]
            turn.sort(key=lambda one: (-one[0][0], one[0][1], one[1]))
            expected |= {(token, expert) for (_, token), expert in turn[: wanted - len(expected)]}
        assert chosen(found[sequence * length : (sequence + 1) * length]) == expected


@given(st.lists(st.integers(0, 20), min_size=1, max_size=6), st.floats(0, 1))
def test_an_equal_capacity_leaves_the_wanted_number(counts, share):
    wanted = share * sum(counts)
    capacity = equal_capacity(torch.tensor(counts), torch.tensor(wanted, dtype=torch.float64)).item()
    assert sum(min(count, capacity) for count in counts) == pytest.approx(wanted)


def test_more_than_all_is_no_capacity():
    assert equal_capacity(torch.tensor([2, 1]), torch.tensor(3.5)).item() == math.inf


def test_an_expert_that_no_token_chooses_has_no_cutoff():
    values = torch.tensor([[0.9, 0.0], [0.8, 0.0], [0.6, 0.0]])
    assert resonance_cutoffs(score_histogram(values), torch.tensor(2.0))[1] == 0


def test_the_cutoffs_of_resonance_leave_every_expert_its_capacity():
    affinity = torch.rand(4000, 4, generator=torch.Generator().manual_seed(0)) - 0.5
    affinity[:, 0] += 0.4  # most tokens choose it
    affinity[:, 3] -= 0.4
    values = chosen_by_tokens(affinity, 2)
    cutoffs = resonance_cutoffs(score_histogram(values), torch.tensor(4000 * 1.25))
    counts = (values > cutoffs).sum(dim=0).tolist()
    assert sum(counts) == pytest.approx(5000, rel=0.01)
    assert cutoffs[3] == pytest.approx(values[:, 3][values[:, 3] > 0].min().item(), abs=1 / NUM_BINS)
    assert counts[3] == (values[:, 3] > 0).sum()
    assert counts[0] == pytest.approx(counts[1], rel=0.01)
    assert counts[0] == pytest.approx(counts[2], rel=0.01)
    assert counts[0] > counts[3]
