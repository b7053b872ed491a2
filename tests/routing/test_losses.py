"""Auxiliary losses by hand, and their independence of how the tokens are spread over ranks."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynmoe.routing import RoutingCounts, losses, top_any, top_k, top_p
from tests import oracles


def logits(seed: int, tokens: int = 12, experts: int = 5) -> torch.Tensor:
    return torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed))


def test_load_balance_of_a_worked_example():
    # Two tokens, two experts, k = 1. Token 0 goes to expert 0, token 1 too: f = [1, 0].
    plan = top_k(torch.tensor([[math.log(3.0), 0.0], [math.log(4.0), 0.0]]), 1)
    # Q_0 = (3/4 + 4/5) / 2 = 0.775, and the loss is 2 * (1 * 0.775 + 0 * 0.225).
    assert losses.load_balance(plan).item() == pytest.approx(1.55)


def test_load_balance_at_perfect_balance_is_k_or_one_per_route():
    cycle = torch.eye(4).repeat(2, 1) * 4.0
    plan = top_p(cycle + cycle.roll(1, dims=1), 0.9)
    mean_k = plan.experts_per_token_T.float().mean().item()
    assert mean_k == 2
    assert losses.load_balance(plan).item() == pytest.approx(mean_k)
    assert losses.load_balance(plan, per_route=True).item() == pytest.approx(1.0)


def test_entropy_and_z_loss_by_token():
    plan = top_p(logits(0), 0.5)
    expected = sum(oracles.entropy(row) for row in plan.scores_TE.double().tolist()) / 12
    assert losses.entropy(plan).item() == pytest.approx(expected, rel=1e-6)
    z = sum(math.log(sum(math.exp(v) for v in row)) ** 2 for row in logits(0).double().tolist()) / 12
    assert losses.z_loss(plan).item() == pytest.approx(z, rel=1e-6)


def test_entropy_of_a_probability_of_zero_has_a_finite_gradient():
    values = torch.tensor([[0.0, float("-inf")], [200.0, -200.0]], requires_grad=True)
    losses.entropy(top_p(values, 0.5)).backward()
    assert values.grad is not None
    assert values.grad.isfinite().all()


def test_z_loss_needs_logits():
    plan = top_any(torch.randn(2, 4), torch.randn(4, 3), torch.zeros(3), torch.ones(3))
    with pytest.raises(ValueError, match="logits"):
        losses.z_loss(dataclasses.replace(plan, logits_TE=None))


def summed(counts: list[RoutingCounts]) -> RoutingCounts:
    return RoutingCounts(
        sum(c.selected_E for c in counts),
        sum(c.num_tokens for c in counts),
        sum(c.num_routed_tokens for c in counts),
        len(counts),
    )


def all_losses(kind: str, values: torch.Tensor, counts: RoutingCounts | None):
    if kind == "top_any":
        plan = top_any(values, torch.eye(5), torch.full((5,), 0.2), torch.ones(5), min_experts=0)
        return plan, losses.gate_balance(plan, counts) + losses.efficiency(plan, counts)
    plan = top_p(values, 0.5) if kind == "top_p" else top_k(values, 2)
    total = losses.load_balance(plan, counts) + losses.load_balance(plan, counts, per_route=True)
    return plan, total + losses.entropy(plan, counts) + losses.z_loss(plan, counts)


@given(st.integers(0, 1000), st.sampled_from(["top_k", "top_p", "top_any"]), st.sampled_from([1, 3, 6]))
def test_value_and_gradient_do_not_depend_on_the_split(seed, kind, cut):
    values = logits(seed)
    whole = values.clone().requires_grad_()
    all_losses(kind, whole, None)[1].backward()

    split = values.clone().requires_grad_()
    parts = [split[:cut], split[cut:]] if cut != 6 else list(split.split(6))
    counts = summed([RoutingCounts.of(all_losses(kind, part, None)[0]) for part in parts])
    # Data parallelism takes the mean of the ranks' losses and gradients.
    torch.stack([all_losses(kind, part, counts)[1] for part in parts]).mean().backward()
    torch.testing.assert_close(split.grad, whole.grad, rtol=1e-5, atol=1e-7)


def test_diversity_counts_active_pairs_only():
    prototypes = torch.tensor([[2.0, 3.0, 0.0], [0.0, 0.0, 1.0]])  # the first two are parallel
    assert losses.diversity(prototypes, torch.ones(3)).item() == pytest.approx(math.sqrt(2.0))
    assert losses.diversity(prototypes, torch.tensor([1.0, 0.0, 1.0])).item() == pytest.approx(0.0, abs=1e-6)
    assert losses.simplicity(prototypes).item() == pytest.approx(2.0)
    assert losses.simplicity(prototypes, torch.tensor([1.0, 0.0, 1.0])).item() == pytest.approx(1.5)


def test_the_load_loss_is_the_squared_variation_of_the_load():
    # Loads 4, 2, 0 of active experts (mean 2, deviations 2, 0, -2), a fourth slot off: CV^2 = (4 + 0 + 4) / 3 / 4.
    hidden = torch.tensor([[1.0, 1.0, 0.0]] * 2 + [[1.0, -1.0, 0.0]] * 2)
    thresholds = torch.full((4,), 0.1, requires_grad=True)
    prototypes = torch.cat([torch.eye(3), torch.ones(3, 1)], dim=1)
    active = torch.tensor([1, 1, 1, 0])
    plan = top_any(hidden, prototypes, thresholds, active, min_experts=0)
    assert plan.tokens_per_expert_E.tolist() == [4, 2, 0, 0]
    loss = losses.choice_balance(plan, active)
    assert loss.item() == pytest.approx(2 / 3)
    loss.backward()
    # Up where there is too much, untouched at the mean, down where there is nothing; no word to a slot that is off.
    assert [value > 0 for value in (-thresholds.grad).tolist()] == [True, False, False, False]
    assert thresholds.grad[1] == 0
    assert thresholds.grad[2] > 0
    assert thresholds.grad[3] == 0


def test_active_experts_are_what_is_counted():
    hidden = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    prototypes = torch.eye(4)
    whole = top_any(hidden, prototypes[:, :2], torch.zeros(2), torch.ones(2))
    active = torch.tensor([1, 1, 0, 0])
    part = top_any(hidden, prototypes, torch.zeros(4), active)
    torch.testing.assert_close(losses.gate_balance(part, active_E=active), losses.gate_balance(whole))
    torch.testing.assert_close(losses.efficiency(part, active_E=active), losses.efficiency(whole))
