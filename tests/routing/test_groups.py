"""Group-limited selection, against DeepSeek-V3's router in transformers and against loops over tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from dynmoe.config import load_config
from dynmoe.errors import ConfigError
from dynmoe.routers import ROUTERS
from dynmoe.routing import RoutingPlan, null_experts, relu, sigmoid_cutoff, top_any, top_k, top_p
from dynmoe.routing.da_moe import experts_by_importance
from dynmoe.routing.groups import within_best_groups
from dynmoe.routing.top_any import cosines
from tests import oracles
from tests.routing.test_routers import chosen_sets, random_logits, seeds, top_any_inputs

# Experts, groups, and groups that a token may use.
shapes = st.sampled_from([(8, 4, 2), (8, 2, 1), (12, 4, 3), (6, 6, 2), (6, 3, 3), (4, 1, 1)])


def usable(values: list[float], n_group: int, topk_group: int) -> set[int]:
    """The experts of the best groups, one token at a time."""
    size = len(values) // n_group
    groups = [list(range(group * size, (group + 1) * size)) for group in range(n_group)]
    sums = [sum(sorted((values[expert] for expert in group), reverse=True)[:2]) for group in groups]
    return {expert for group in oracles.descending(sums)[:topk_group] for expert in groups[group]}


def limited(values: list[float], groups: tuple[int, int]) -> list[float]:
    allowed = usable(values, *groups)
    return [value if expert in allowed else float("-inf") for expert, value in enumerate(values)]


@pytest.mark.parametrize("bias", [0.0, 0.2, -3.0], ids=["none", "mixed", "below zero"])
@pytest.mark.parametrize("norm", [True, False])
def test_top_k_equals_the_router_of_deepseek_v3(bias, norm):
    """Also where biased scores are negative: a score of 0 for other groups would then win."""
    config = DeepseekV3Config(
        hidden_size=16, n_routed_experts=32, n_group=8, topk_group=3, num_experts_per_tok=6, norm_topk_prob=norm,
        routed_scaling_factor=2.5,
    )  # fmt: skip
    router = DeepseekV3TopkRouter(config)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 16, generator=generator)
    with torch.no_grad():
        router.weight.normal_(generator=generator)
        router.e_score_correction_bias.normal_(std=0.2, generator=generator).add_(bias).mul_(bias != 0.0)
        logits, weights, indices = router(x)
    fields = [
        "model.router.kind=top_k", "model.router.k=6", "model.router.score_function=sigmoid",
        f"model.router.renormalize={norm}", "model.router.gate_scale=2.5", "model.router.n_group=8",
        "model.router.topk_group=3", "model.moe.experts=32",
    ]  # fmt: skip
    spec = load_config(None, fields).model.router.resolved

    class State:
        training = True
        bias_E = router.e_score_correction_bias
        weight_ED = router.weight.detach()
        linear = staticmethod(torch.nn.functional.linear)

    plan = spec.plan(State(), x)
    expected = torch.zeros(200, 32).scatter_(1, indices, weights)
    assert torch.equal(plan.routing_map_TE, expected > 0)
    torch.testing.assert_close(plan.gates_TE, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(plan.logits_TE, logits)


@given(seeds, shapes, st.data())
def test_top_k_and_top_p_select_within_the_best_groups(seed, shape, data):
    num_experts, *groups = shape
    names = {"n_group": groups[0], "topk_group": groups[1]}
    most = num_experts * groups[1] // groups[0]
    k = data.draw(st.integers(1, most))
    low = data.draw(st.integers(1, most))
    p = data.draw(st.sampled_from([0.1, 0.4, 0.8, 1.0]))
    logits = random_logits(seed, (5, num_experts))
    plan = top_p(logits, p, min_experts=low, **names)
    rows = plan.scores_TE.tolist()
    for token, row in enumerate(rows):
        allowed = usable(row, *groups)
        own = [row[expert] if expert in allowed else 0.0 for expert in range(num_experts)]
        assert chosen_sets(plan)[token] == oracles.top_p_choice(own, p, "paper", low) & allowed
    assert chosen_sets(top_k(logits, k, **names)) == [oracles.top_k_choice(limited(row, groups), k) for row in rows]
    torch.testing.assert_close(plan.gates_TE, plan.scores_TE * plan.routing_map_TE, msg="gates are of all experts")


@given(seeds, shapes, st.integers(0, 2), st.one_of(st.none(), st.integers(2, 4)))
def test_threshold_routers_select_within_the_groups_of_best_margins(seed, shape, low, high):
    num_experts, *groups = shape
    names = {"n_group": groups[0], "topk_group": groups[1]}
    logits = random_logits(seed, (5, num_experts))
    cutoffs = torch.rand(num_experts, generator=torch.Generator().manual_seed(seed))

    def check(plan: RoutingPlan, margins: torch.Tensor, low: int) -> None:
        rows = [limited(row, groups) for row in margins.tolist()]
        everyone = [True] * num_experts
        assert chosen_sets(plan) == [oracles.top_any_choice(row, everyone, low, high) for row in rows]
        assert plan.unclaimed_T.tolist() == [max(row) <= 0 for row in rows]

    low = min(low, num_experts * groups[1] // groups[0])
    plan = sigmoid_cutoff(logits, cutoffs, min_experts=low, max_experts=high, **names)
    check(plan, plan.scores_TE - cutoffs, low)
    check(relu(logits, max_experts=high, **names), logits, 0)


@given(
    seeds, st.sampled_from([(8, 4, 2), (6, 2, 1), (6, 3, 3)]), st.integers(0, 2), st.sampled_from(["paper", "released"])
)
def test_top_any_never_leaves_its_groups_and_skips_inactive_experts(seed, shape, low, variant):
    num_experts, *groups = shape
    hidden, prototypes, thresholds, active = top_any_inputs(seed, 5, num_experts)
    plan = top_any(
        hidden, prototypes, thresholds, active, variant=variant, min_experts=low, n_group=groups[0],
        topk_group=groups[1],
    )  # fmt: skip
    scores = torch.sigmoid(cosines(hidden, prototypes)) * active
    margins = scores - torch.sigmoid(thresholds) if variant == "released" else cosines(hidden, prototypes) - thresholds
    last = -1.0 if variant == "released" else -1.0 - thresholds.max()
    ranked = (scores if variant == "released" else margins).masked_fill(~active, last)
    for token, row in enumerate(margins.tolist()):
        allowed = usable(ranked[token].tolist(), *groups)
        usable_ones = [expert in allowed and on for expert, on in enumerate(active.tolist())]
        floor = 0 if variant == "released" else low
        assert chosen_sets(plan)[token] == oracles.top_any_choice(row, usable_ones, floor)


@given(seeds, shapes, st.integers(1, 3), st.data())
def test_zero_computation_experts_are_in_no_group(seed, shape, num_null, data):
    num_experts, *groups = shape
    k = data.draw(st.integers(1, num_experts * groups[1] // groups[0] + num_null))
    logits = random_logits(seed, (5, num_experts + num_null))
    plan = null_experts(logits, k, num_null, n_group=groups[0], topk_group=groups[1])
    for token, row in enumerate(logits.softmax(dim=1).tolist()):
        own = [*limited(row[:num_experts], groups), *row[num_experts:]]
        assert chosen_sets(plan)[token] == oracles.top_k_choice(own, k) & set(range(num_experts))


@given(seeds, shapes)
def test_important_tokens_get_no_more_than_their_groups_have(seed, shape):
    num_experts, *groups = shape
    probs = random_logits(seed, (5, num_experts)).softmax(dim=1)
    importance = torch.tensor([0.1, 1.0, 2.0, 4.0, 99.0])
    found = experts_by_importance(probs, importance, torch.tensor(1.0), n_group=groups[0], topk_group=groups[1])
    for token, row in enumerate(probs.tolist()):
        wanted = max(1, min(round(float(importance[token])), num_experts * groups[1] // groups[0]))
        assert set(found[token].nonzero().flatten().tolist()) == oracles.top_k_choice(limited(row, groups), wanted)


def test_equal_groups_go_to_the_lower_one():
    values = torch.zeros(1, 6)
    assert within_best_groups(values, 3, 1).tolist() == [[0.0, 0.0, *[float("-inf")] * 4]]
    assert within_best_groups(values, 3, 3) is values


@pytest.mark.parametrize(
    ("groups", "named"), [((3, 1), "n_group=3"), ((2, 3), "topk_group=3"), ((2, 0), "topk_group=0")]
)
def test_impossible_groups_are_refused(groups, named):
    with pytest.raises(ValueError, match=named):
        within_best_groups(torch.zeros(1, 8), *groups)


@pytest.mark.parametrize(("fields", "words"), [
    (["n_group=3"], r"model.router.n_group=3: does not divide the experts of a layer \(16\); use a divisor of"),
    (["n_group=4", "topk_group=5"], r"model.router.topk_group=5: is more than there are groups; use at most"),
    (["kind=top_k", "n_group=8", "k=3"], r"router.k=3: is more than there are experts; use at most the experts of 1"),
    (["n_group=8", "min_experts=3"], "model.router.min_experts=3: is more than there are experts; use at most"),
    (["kind=sigmoid", "n_group=8", "initial_experts=3"], "model.router.initial_experts=3.0: is more than there are"),
    (["kind=identity_experts", "n_group=8", "num_identity=2", "k=5"], "k=5: .* the 2 experts and 2 zero-computation"),
])  # fmt: skip
def test_configurations_that_groups_make_impossible_are_refused(fields, words):
    with pytest.raises(ConfigError, match=words):
        load_config(None, [f"model.router.{field}" for field in fields])


def test_routers_that_do_not_choose_the_best_experts_of_a_token_are_refused():
    refused = {kind for kind, router in ROUTERS.items() if not router.LIMITS_GROUPS}
    assert refused == {"expert_race", "expert_threshold", "quantile", "resonance", "seq_top_k"}
    for kind in refused:
        with pytest.raises(ConfigError, match=rf"model.router.n_group=2: the {kind} router does not .*; use 1$"):
            ROUTERS[kind](n_group=2)


def test_a_budget_beyond_the_groups_or_by_quantiles_is_refused():
    groups = ["model.router.n_group=8", "budget.experts_per_token=3"]
    with pytest.raises(ConfigError, match=r"budget.experts_per_token=3.0: is not a possible number .* \(1 to 2\)"):
        load_config(None, [*groups, "budget.method=pi"])
    fields = ["model.router.kind=top_k", "model.router.n_group=4", "budget.method=quantile"]
    with pytest.raises(ConfigError, match=r"budget.method='quantile': gives experts shares of all tokens, of which"):
        load_config(None, fields)
