from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynmoe.routing.selection import sort_descending

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
