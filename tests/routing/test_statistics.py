from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynmoe.routing import apply_capacity, top_any, top_p
from dynmoe.routing.statistics import LayerCounts, pack, packed_size, summarize
from tests import oracles


@given(st.integers(0, 10**6), st.integers(1, 40), st.sampled_from([2, 4, 6]), st.sampled_from([None, 2, 5]))
def test_figures_equal_a_count_over_the_maps(seed, tokens, experts, capacity):
    logits = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed)) * 2
    plan = top_p(logits, 0.6)
    if capacity is not None:
        plan = apply_capacity(plan, capacity)
    vector = pack(plan)
    assert vector.shape == (packed_size(experts),)
    figures = summarize(LayerCounts(vector, experts), experts, experts, 2)

    used = [int(row.sum()) for row in plan.routing_map_TE]
    selected = [int(row.sum()) for row in plan.selected_map_TE]
    load = [int(column.sum()) for column in plan.routing_map_TE.T]
    assert figures["experts_per_token_mean"] == pytest.approx(sum(used) / tokens)
    for percent in (5, 50, 95):
        # The smallest K that at least this share of the tokens does not exceed.
        exact = next(k for k in range(experts + 1) if sum(u <= k for u in used) * 100 >= percent * tokens)
        assert figures[f"experts_per_token_p{percent}"] == exact
    assert figures["experts_per_token_max"] == max(used)
    assert figures["tokens_all_dropped_frac"] == pytest.approx(
        sum(s > 0 and u == 0 for s, u in zip(selected, used, strict=True)) / tokens
    )
    assert figures["selected_per_token_mean"] == pytest.approx(sum(selected) / tokens)
    assert figures["tokens_without_expert_frac"] == 0
    assert figures["tokens_at_ceiling_frac"] == pytest.approx(sum(u == experts for u in used) / tokens)
    assert figures["dropped_routes_frac"] == pytest.approx((sum(selected) - sum(used)) / sum(selected))
    assert figures["dead_experts"] == sum(count == 0 for count in load)
    if sum(load):
        assert figures["load_max_over_mean"] == pytest.approx(max(load) / np.mean(load))
        assert figures["load_cv"] == pytest.approx(np.std(load) / np.mean(load), abs=1e-6)
        ranks = [sum(load[: experts // 2]), sum(load[experts // 2 :])]
        assert figures["ep_rank_load_max_over_mean"] == pytest.approx(max(ranks) / np.mean(ranks))
    entropies = [oracles.entropy(row) for row in plan.scores_TE.double().tolist()]
    assert figures["router_entropy"] == pytest.approx(np.mean(entropies), rel=1e-5)
    best = plan.scores_TE.sort(dim=1, descending=True).values
    assert figures["top1_margin"] == pytest.approx((best[:, 0] - best[:, 1]).mean().item(), rel=1e-5)


def test_vectors_of_parts_add_up():
    logits = torch.randn(10, 4)
    whole = pack(top_p(logits, 0.5))
    parts = [pack(top_p(part, 0.5)) for part in logits.split(5)]
    torch.testing.assert_close(whole, parts[0] + parts[1])


def test_tokens_without_expert_and_masked_experts():
    hidden = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    prototypes = torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    active = torch.tensor([True, True, False])
    plan = top_any(hidden, prototypes, torch.zeros(3), active, variant="released")
    figures = summarize(LayerCounts(pack(plan), 3), 2, 3, 1)
    assert figures["tokens_without_expert_frac"] == 0.5
    assert figures["active_experts"] == 2
    assert figures["dead_experts"] == 0
    assert figures["load_cv"] == 0  # over the active experts, which are equally loaded
    assert figures["experts_per_token_p50"] == 0
