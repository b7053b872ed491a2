"""Zero-computation experts, token by token and against the formulas of the papers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynmoe.config import load_config
from dynmoe.errors import ConfigError
from dynmoe.routing import RoutingCounts
from dynmoe.routing.identity_experts import (
    constant_output,
    ffn_bias_change,
    group_balance,
    identity_experts,
    identity_output,
)
from tests import oracles
from tests.routing.test_routers import chosen_sets, random_logits, seeds, sizes


@given(seeds, sizes, st.integers(1, 4), st.data())
def test_the_best_of_all_experts_by_probability_plus_bias(seed, shape, free, data):
    total = shape[1] + free
    k = data.draw(st.integers(1, total))
    logits = random_logits(seed, (shape[0], total))
    bias = 0.2 * torch.randn(total, generator=torch.Generator().manual_seed(seed))
    plan, gates_TZ = identity_experts(logits, k, shape[1], bias_X=bias)
    probs = torch.softmax(logits, dim=1)
    for token, row in enumerate(probs.tolist()):
        chosen = oracles.top_k_choice((probs[token] + bias).tolist(), k)
        assert chosen_sets(plan)[token] == {expert for expert in chosen if expert < shape[1]}
        gates = [*plan.gates_TE[token].tolist(), *gates_TZ[token].tolist()]
        assert gates == pytest.approx([row[e] if e in chosen else 0.0 for e in range(total)], rel=1e-5)
        assert bool(plan.unclaimed_T[token]) == all(expert >= shape[1] for expert in chosen)


@given(seeds, st.integers(1, 5), st.integers(0, 3), st.integers(0, 2), st.integers(1, 3))
def test_outputs_of_identity_zero_and_constant_experts(seed, tokens, num_identity, num_zero, num_constant):
    generator = torch.Generator().manual_seed(seed)
    gates = torch.rand(tokens, num_identity + num_zero + num_constant, generator=generator)
    x = torch.randn(tokens, 6, generator=generator)
    mix = torch.randn(tokens, num_constant, 2, generator=generator)
    constants = torch.randn(num_constant, 6, generator=generator)
    found = identity_output(x, gates, num_identity) + constant_output(x, gates, mix, constants)
    for token in range(tokens):
        expected = torch.zeros(6)
        for expert in range(num_identity):
            expected = expected + gates[token, expert] * x[token]
        for expert in range(num_constant):
            of_token, of_constant = mix[token, expert].softmax(0)
            value = of_token * x[token] + of_constant * constants[expert]
            expected = expected + gates[token, num_identity + num_zero + expert] * value
        torch.testing.assert_close(found[token], expected)


def test_the_bias_rule_of_a_worked_example():
    # 10 tokens, k = 3, three FFN experts, of which a token takes 1.5: 5 tokens each. One has 5, one 8, one none.
    change = ffn_bias_change(torch.tensor([5.0, 8.0, 0.0]), torch.tensor(10.0), 3, 1.5, rate=0.6)
    assert change.tolist() == pytest.approx([0.0, 0.6 * (5 - 8) / 30, 0.6 * 5 / 30])


@given(seeds, st.sampled_from([1, 2, 4]), st.floats(0.5, 2.5))
def test_the_balance_loss_of_groups_token_by_token(seed, groups, target):
    logits = random_logits(seed, (9, 7))
    plan, gates_TZ = identity_experts(logits, 3, 4)
    probs = torch.softmax(logits, dim=1).double()
    size = 4 // groups
    expected = 0.0
    for group in range(groups + 1):
        members = list(range(group * size, (group + 1) * size)) if group < groups else [4, 5, 6]
        chosen = [*(plan.routing_map_TE[:, e] for e in range(4)), *(gates_TZ[:, e] > 0 for e in range(3))]
        selections = sum(int(chosen[expert].sum()) for expert in members)
        factor = groups / (target * 9) if group < groups else 1 / ((3 - target) * 9)
        expected += factor * selections * float(probs[:, members].sum()) / 9
    assert group_balance(plan, 3, groups, target).item() == pytest.approx(expected, rel=1e-4)


@given(seeds, st.integers(1, 11))
def test_the_balance_loss_does_not_depend_on_the_split(seed, cut):
    values = random_logits(seed, (12, 6))
    whole = values.clone().requires_grad_()
    split = values.clone().requires_grad_()
    plan, _ = identity_experts(whole, 3, 4)
    expected = group_balance(plan, 3, 2, 1.5)
    expected.backward()
    parts = [identity_experts(part, 3, 4)[0] for part in (split[:cut], split[cut:])]
    own = [RoutingCounts.of(part) for part in parts]
    losses = torch.stack([group_balance(part, 3, 2, 1.5, own[0] + own[1]) for part in parts])
    losses.mean().backward()
    torch.testing.assert_close(losses.mean(), expected)
    torch.testing.assert_close(split.grad, whole.grad, rtol=1e-5, atol=1e-7)


def test_a_balance_loss_at_equal_shares_is_the_mean_probability_of_all():
    # Each of two tokens takes one of two FFN experts and one of two identity experts.
    logits = torch.tensor([[2.0, 0.0, 2.0, 0.0], [0.0, 2.0, 0.0, 2.0]])
    plan, _ = identity_experts(logits, 2, 2)
    assert group_balance(plan, 2, 2, 1.0).item() == pytest.approx(1.0)
    with_all, _ = identity_experts(logits[:, :3], 2, 2)
    assert torch.isfinite(group_balance(with_all, 2, 2, 2.0))  # no zero-computation expert is wanted


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: identity_experts(torch.zeros(1, 4), 2, 4), "num_experts=4"),
        (lambda: identity_experts(torch.zeros(1, 4), 5, 2), "k=5"),
    ],
)
def test_numbers_out_of_range_are_named(call, named):
    with pytest.raises(ValueError, match=named):
        call()


KIND = "model.router.kind=identity_experts"


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["model.router.num_identity=0"], "model.router.num_identity=0: leaves no zero-computation expert"),
        (["model.router.k=40"], "the 16 experts and 8 zero-computation experts (24)"),
        (["model.router.balance_groups=3"], "does not divide the experts of a layer (16)"),
        (
            ["model.router.balance_groups=8", "model.moe.experts_by_layer=[8,12,16,16]"],
            "does not divide the experts of a layer (12)",
        ),
        (["budget.method=loss_free", "budget.experts_per_token=3.5"], "is not a possible number of experts per token"),
        (["budget.method=loss_free"], "budget.experts_per_token=None: is needed"),
        (["budget.method=pi", "budget.experts_per_token=2"], "use none or loss_free"),
    ],
)
def test_settings_that_do_not_fit_are_named(overrides, named):
    with pytest.raises(ConfigError) as error:
        load_config(None, [KIND, *overrides])
    assert named in str(error.value)
