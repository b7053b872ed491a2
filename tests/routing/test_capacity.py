from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynmoe.routing import apply_capacity, expert_capacity, limit_routes, top_p
from tests import oracles


def test_capacity_follows_the_routes_that_there_are():
    # 8 tokens with 2.5 experts each, spread over 4 active experts: 5 each at balance.
    assert expert_capacity(20, 4, 1.0) == 5
    assert expert_capacity(20, 4, 1.25) == 7  # 6.25 rounded up
    assert expert_capacity(0, 4, 1.0) == 1


def test_capacity_refuses_what_makes_no_sense():
    with pytest.raises(ValueError, match="factor=0"):
        expert_capacity(20, 4, 0)


@given(
    st.integers(0, 10**6), st.integers(0, 14), st.integers(1, 6), st.integers(1, 8),
    st.sampled_from(["probs", "position"]), st.booleans(),
)  # fmt: skip
def test_f18_drops_equal_a_brute_force_count(seed, tokens, experts, capacity, policy, ties):
    logits = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed))
    plan = top_p(logits.round() if ties else logits, 0.7)
    limited = apply_capacity(plan, capacity, policy)
    expected = oracles.kept_under_capacity(plan.scores_TE, plan.routing_map_TE, capacity, policy)
    assert torch.equal(limited.routing_map_TE, expected)
    assert torch.equal(limited.selected_map_TE, plan.routing_map_TE)
    assert torch.equal(limited.gates_TE, plan.gates_TE * expected)
    dropped = plan.routing_map_TE & ~limited.routing_map_TE
    assert limited.routing_map_TE.sum() + dropped.sum() == plan.routing_map_TE.sum()
    assert (limited.tokens_per_expert_E <= capacity).all()


@given(
    st.integers(0, 10**6), st.integers(0, 14), st.integers(1, 6), st.integers(0, 40),
    st.sampled_from(["probs", "position"]), st.booleans(),
)  # fmt: skip
def test_limit_routes_takes_from_all_tokens_alike(seed, tokens, experts, max_routes, policy, ties):
    logits = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed))
    plan = top_p(logits.round() if ties else logits, 0.7)
    limited = limit_routes(plan, max_routes, policy)
    expected = oracles.kept_within_limit(plan.scores_TE, plan.routing_map_TE, max_routes, policy)
    assert torch.equal(limited.routing_map_TE, expected)
    assert torch.equal(limited.selected_map_TE, plan.routing_map_TE)
    assert limited.routing_map_TE.sum() == min(max_routes, int(plan.routing_map_TE.sum()))


@pytest.mark.parametrize("limit", [apply_capacity, limit_routes])
def test_an_unknown_policy_is_named(limit):
    with pytest.raises(ValueError, match="policy='oldest'"):
        limit(top_p(torch.zeros(1, 2), 0.5), 1, "oldest")
