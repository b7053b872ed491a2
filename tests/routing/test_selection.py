from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynmoe.routing.selection import rank_descending, sort_descending

INF = float("inf")
NAN = float("nan")


@given(st.integers(0, 10**6), st.integers(0, 9), st.integers(1, 70), st.sampled_from([0.0, 0.5, 3.0, 1e30]))
def test_the_order_is_that_of_a_stable_sort(seed, tokens, experts, scale):
    scores = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed)) * scale
    for values in (scores, scores.round(), scores.double()):
        ours = sort_descending(values)
        expected = values.sort(dim=1, descending=True, stable=True)
        assert torch.equal(ours[0], expected.values)
        assert torch.equal(ours[1], expected.indices)


@pytest.mark.parametrize("row", [[1.0, NAN, INF, -INF, 2.0], [-0.0, 0.0, -1e-45, 1e-45, -0.0, 0.0], [NAN, NAN, 0.0]])
def test_numbers_at_the_edges(row):
    scores = torch.tensor([row])
    ours = sort_descending(scores)
    expected = scores.sort(dim=1, descending=True, stable=True)
    assert torch.equal(ours[1], expected.indices)
    torch.testing.assert_close(ours[0], expected.values, equal_nan=True)


def test_no_gradient_goes_through_the_order():
    scores = torch.randn(3, 4, requires_grad=True)
    assert not sort_descending(scores)[0].requires_grad


@pytest.mark.slow
@pytest.mark.parametrize("experts", [4, 8, 16])
def test_compiled_ranks_are_right_next_to_a_softmax(experts):
    """Where PyTorch's compiler loses a scatter of ranks (findings/inductor_loses_scatter.sh)."""

    def choose(logits_TE):
        probs_TE = logits_TE.softmax(dim=1)
        map_TE = rank_descending(probs_TE / (probs_TE + 1.0)) < 2
        return map_TE, probs_TE.masked_fill(~map_TE, 0.0)

    logits_TE = torch.randn(7, experts, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        map_TE, gates_TE = torch.compile(choose, dynamic=True)(logits_TE)
        expected = choose(logits_TE)
    assert torch.equal(map_TE, expected[0])
    torch.testing.assert_close(gates_TE, expected[1])
