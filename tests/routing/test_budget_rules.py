"""Controllers on plants that can be computed by hand."""

from __future__ import annotations

import pytest
import torch

from dynmoe.routing import budget_rules


def test_a_schedule_is_linear_and_then_constant():
    targets = [budget_rules.scheduled_target(2.0, 6.0, 4, step) for step in range(6)]
    assert targets == [6.0, 5.0, 4.0, 3.0, 2.0, 2.0]
    assert budget_rules.scheduled_target(2.0, None, 0, 0) == 2.0


def test_the_error_is_relative_and_bounded_below():
    errors = [budget_rules.budget_error(torch.tensor(k), 2.0).item() for k in (0.0, 1.0, 2.0, 3.0, 16.0)]
    assert errors == pytest.approx([1.0, 0.5, 0.0, -0.5, -1.0])


def run(plant, steps: int, p: float = 0.5, target: float = 2.0) -> list[float]:
    p = torch.tensor(p)
    previous = torch.tensor(0.0)
    observed = []
    for step in range(steps):
        k = torch.tensor(plant(p.item(), step))
        observed.append(k.item())
        error = budget_rules.budget_error(k, target)
        p = budget_rules.shift_probability(p, budget_rules.pi_change(error, previous, proportional=0.1, integral=0.4))
        previous = error
    return observed


@pytest.mark.parametrize("start", [0.01, 0.5, 0.99])
def test_the_controller_settles_on_a_router_of_equal_probabilities(start):
    observed = run(lambda p, step: 16 * p, 60, start)
    assert observed[-1] == pytest.approx(2.0, rel=1e-3)


def test_nothing_winds_up_while_the_target_is_out_of_reach():
    """A plant that cannot give 2 for 1000 steps, and then can: the answer does not take as long again."""
    observed = run(lambda p, step: 1.0 if step < 1000 else 4 * p, 1060)
    assert observed[-1] == pytest.approx(2.0, rel=0.02)


def test_a_probability_stays_inside_its_range():
    assert budget_rules.shift_probability(torch.tensor(0.5), torch.tensor(50.0)).item() == pytest.approx(1 - 1e-4)
    assert budget_rules.shift_probability(torch.tensor(0.5), torch.tensor(-50.0)).item() == pytest.approx(1e-4)


def test_balance_moves_thresholds_of_active_experts_and_not_their_sum():
    selected = torch.tensor([30.0, 10.0, 20.0, 0.0])
    active = torch.tensor([True, True, True, False])
    # The mean load of active experts is 20: excesses 0.5, -0.5, 0.
    assert budget_rules.balance_change(selected, active, 0.1).tolist() == pytest.approx([0.05, -0.05, 0.0, 0.0])
    # An excess of 2 counts as 1, and what that takes off the sum is given back to all: (1 - 0.75 - 0.75) / 3.
    change = budget_rules.balance_change(torch.tensor([90.0, 7.5, 7.5, 0.0]) * 3, active, 1.0)
    assert change.sum().item() == pytest.approx(0.0, abs=1e-6)
    assert change[0] > 0 > change[1] == change[2]
    assert change[3] == 0


def test_the_bias_of_top_k_moves_by_the_sign_of_the_load():
    change = budget_rules.bias_change(torch.tensor([5.0, 1.0, 3.0]), 0.001)
    assert change.tolist() == pytest.approx([-0.001, 0.001, 0.0])
