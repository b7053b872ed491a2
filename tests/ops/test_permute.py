from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from dynmoe.ops import Permutation, attach_loss, gather_rows, sum_rows

maps = st.tuples(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 6), st.sampled_from([0.0, 0.2, 0.6, 1.0]))


def random_map(seed: int, tokens: int, experts: int, density: float) -> torch.Tensor:
    return torch.rand(tokens, experts, generator=torch.Generator().manual_seed(seed)) < density


def test_a_worked_example():
    # Token 0 takes experts 0 and 2, token 1 none, token 2 expert 0.
    permutation = Permutation.of(torch.tensor([[1, 0, 1], [0, 0, 0], [1, 0, 0]], dtype=torch.bool))
    assert permutation.token_N.tolist() == [0, 2, 0]  # expert 0: tokens 0 and 2; expert 2: token 0
    assert permutation.route_N.tolist() == [0, 6, 2]
    assert permutation.row_N.tolist() == [0, 2, 1]  # token 0: rows 0 and 2; token 2: row 1
    assert permutation.token_offsets.tolist() == [0, 2, 2, 3]
    assert permutation.ends_E.tolist() == [2, 2, 3]


@given(maps)
def test_gather_and_sum_equal_loops_with_gradients(case):
    routing_map = random_map(*case)
    permutation = Permutation.of(routing_map)
    x = torch.randn(routing_map.shape[0], 3, dtype=torch.float64, requires_grad=True)
    rows = gather_rows(x, permutation)
    expected = [x[t] for e in range(routing_map.shape[1]) for t in range(routing_map.shape[0]) if routing_map[t, e]]
    assert torch.equal(rows, torch.stack(expected) if expected else x[:0])

    weight = torch.arange(1.0, rows.shape[0] + 1, dtype=torch.float64).unsqueeze(1)
    total = sum_rows(rows * weight, permutation)
    brute = torch.zeros_like(x)
    for row, token in enumerate(permutation.token_N.tolist()):
        brute[token] += x.detach()[token] * weight[row]
    torch.testing.assert_close(total, brute)

    total.square().sum().backward()
    factor = torch.zeros(x.shape[0], 1, dtype=torch.float64)
    for row, token in enumerate(permutation.token_N.tolist()):
        factor[token] += weight[row]
    torch.testing.assert_close(x.grad, 2 * x.detach() * factor**2)


def test_attached_loss_leaves_the_value_and_adds_its_gradient():
    hidden = torch.randn(3, requires_grad=True)
    weight = torch.tensor(2.0, requires_grad=True)
    out = attach_loss(hidden, weight.square(), 0.25)
    assert torch.equal(out, hidden)
    out.sum().backward()
    assert torch.equal(hidden.grad, torch.ones(3))
    assert weight.grad.item() == 0.25 * 2 * 2.0
