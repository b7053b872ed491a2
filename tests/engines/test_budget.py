"""The budget of experts per token is reached from both sides and after a change of the target."""

from __future__ import annotations

import pytest
import torch

from dynmoe.moe.budget import Budget
from tests.engines.cases import GLOBAL_BATCH, LENGTH, config_for, train

SETTLED = 70
WINDOW = 50
BASE = ["model.moe.experts=16", "train.micro_batch=8"]
TWO = "budget.experts_per_token=2"
TOP_ANY = ["model.router.kind=top_any"]
IMPROVED = [*TOP_ANY, "model.router.variant=improved"]
# Overrides that enable the budget, that start with one expert per token, and with half of the experts.
FEW = ["model.router.initial_experts=0.01"]
HALF = ["model.router.initial_experts=8"]
HOLDERS = {
    "top_p": (["model.router.kind=top_p", "budget.method=pi"], ["model.router.p=0.01"], ["model.router.p=0.7"]),
    "top_any": ([*TOP_ANY, "budget.method=pi"], FEW, HALF),
    "top_any improved": ([*IMPROVED, "budget.method=pi"], FEW, HALF),
    "da_moe": (
        ["model.router.kind=da_moe", "budget.method=pi"],
        ["model.router.experts_at_uniform=0.1"],
        ["model.router.experts_at_uniform=9"],
    ),
    "top_any loss-free": ([*IMPROVED, "budget.method=loss_free"], FEW, HALF),
}


def experts_per_token(result) -> list[float]:
    """Mean over tokens and layers, by step."""
    return [sum(rows.values()) / len(rows) / (GLOBAL_BATCH * LENGTH) for rows in result["rows"]]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


# Two forward passes of four sequences over all ranks. The fast tests cover one router from each side on one rank.
SPREAD = {
    "EP 2": ["engine=megatron", "train.micro_batch=2", "parallel.expert=2"],
    "PP 2": ["engine=megatron", "train.micro_batch=4", "parallel.pipeline=2"],
}
FAST = {
    ("top_p", "half", "alone"), ("top_any improved", "one", "alone"),
}  # fmt: skip
BOTH_SIDES = [
    pytest.param(
        holder, start, layout,
        marks=() if (holder, start, layout) in FAST else pytest.mark.slow,
    )
    for holder in HOLDERS for start in ("one", "half") for layout in ("alone", *SPREAD)
]  # fmt: skip


@pytest.mark.parametrize(("holder", "start", "layout"), BOTH_SIDES)
def test_the_budget_is_reached_from_both_sides_and_after_a_change(one_rank, two_ranks, tmp_path, holder, start, layout):
    overrides, few, half = HOLDERS[holder]
    pool = one_rank if layout == "alone" else two_ranks
    overrides = [*BASE, *overrides, *(few if start == "one" else half), *SPREAD.get(layout, [])]
    saved = str(tmp_path / "saved")
    first = pool.run(train, [*overrides, TWO], 0, SETTLED + WINDOW, "", saved)[0]
    observed = experts_per_token(first)
    assert observed[0] == pytest.approx(1.0, abs=0.1) if start == "one" else observed[0] > 6.0
    assert mean(observed[SETTLED:]) == pytest.approx(2.0, rel=0.02)
    last = SETTLED + WINDOW
    changed = [*overrides, "budget.experts_per_token=4"]
    second = pool.run(train, changed, last, last + SETTLED + WINDOW, saved)[0]
    assert mean(experts_per_token(second)[SETTLED:]) == pytest.approx(4.0, rel=0.02)


@pytest.mark.parametrize("layout", ["alone", *(pytest.param(name, marks=pytest.mark.slow) for name in SPREAD)])
@pytest.mark.parametrize("target", [1.25, 2.5])
def test_biases_of_ffn_experts_hold_their_number(one_rank, two_ranks, layout, target):
    """A token selects three of 16 FFN and eight identity experts: without a budget, two FFN experts.

    The rate is ten times the default, as 70 steps are few.
    """
    pool = one_rank if layout == "alone" else two_ranks
    overrides = [*BASE, "model.router.kind=identity_experts", "budget.method=loss_free", "budget.rate=1"]
    budget = f"budget.experts_per_token={target}"
    observed = experts_per_token(pool.run(train, [*overrides, budget, *SPREAD.get(layout, [])], 0, SETTLED + WINDOW)[0])
    assert observed[0] == pytest.approx(2.0, abs=0.25)
    assert mean(observed[SETTLED:]) == pytest.approx(target, rel=0.02)


GROUPED = {
    "top_p": ["model.router.kind=top_p", "budget.method=pi"],
    "sigmoid": ["model.router.kind=sigmoid", "budget.method=loss_free", "model.router.initial_experts=4"],
    "top_any": [*IMPROVED, "budget.method=pi", "model.router.initial_experts=4"],
}


@pytest.mark.parametrize(("kind", "layout"), [
    pytest.param(kind, layout, marks=() if (kind, layout) == ("top_p", "alone") else pytest.mark.slow)
    for kind in GROUPED for layout in ("alone", "EP 2")
])  # fmt: skip
def test_a_budget_is_held_within_groups(one_rank, two_ranks, kind, layout):
    """Of 16 experts in four groups, a token uses those of two groups; each of two ranks has two groups."""
    groups = ["model.router.n_group=4", "model.router.topk_group=2"]
    overrides = [*BASE, *GROUPED[kind], TWO, *groups, *SPREAD.get(layout, [])]
    pool = one_rank if layout == "alone" else two_ranks
    result = pool.run(train, overrides, 0, SETTLED + WINDOW)[0]
    assert mean(experts_per_token(result)[SETTLED:]) == pytest.approx(2.0, rel=0.02)
    for maps in result["maps"].values():
        used = torch.cat(maps).unflatten(1, (4, 4)).any(dim=2).sum(dim=1)
        assert used.max() == 2


SEVERAL = {
    "top_p": ["model.router.kind=top_p", "budget.method=pi"],
    "sigmoid": ["model.router.kind=sigmoid", "budget.method=pi"],
    "top_any": [*IMPROVED, "budget.method=loss_free"],
    "identity_experts": ["model.router.kind=identity_experts", "model.router.k=5", "budget.method=loss_free",
                         "budget.rate=1"],
    "top_k": ["model.router.kind=top_k"],
}  # fmt: skip
OF_SEVERAL = [
    pytest.param(kind, layout, marks=() if (kind, layout) == ("top_p", "alone") else pytest.mark.slow)
    for kind in SEVERAL for layout in ("alone", *SPREAD)
]  # fmt: skip


@pytest.mark.parametrize(("kind", "layout"), OF_SEVERAL)
def test_each_of_several_budgets_is_reached(one_rank, two_ranks, kind, layout):
    overrides = [*BASE, *SEVERAL[kind], "model.router.budgets=[1,2,4]", TWO, *SPREAD.get(layout, [])]
    pool = one_rank if layout == "alone" else two_ranks
    settled = 3 * SETTLED
    observed = experts_per_token(pool.run(train, overrides, 0, settled + 3 * WINDOW)[0])
    budget = Budget(config_for(*overrides))
    for wanted in (1, 2, 4):
        own = [k for step, k in enumerate(observed, 1) if step > settled and budget.of_step(step) == wanted]
        assert len(own) == WINDOW
        assert mean(own) == pytest.approx(wanted, rel=0.02)


def test_a_resumed_run_draws_the_same_budgets(one_rank, tmp_path):
    overrides = [*BASE, *SEVERAL["top_p"], "model.router.budgets=[1,2,4]", TWO]
    saved = str(tmp_path / "saved")
    (whole,) = one_rank.run(train, overrides, 0, 14, "", saved, 8)
    (second,) = one_rank.run(train, overrides, 8, 14, saved)
    assert second["losses"] == whole["losses"][8:]
    assert second["rows"] == whole["rows"][8:]
    assert all(torch.equal(value, second["state"][name]) for name, value in whole["state"].items())


@pytest.mark.parametrize("layout", ["alone", pytest.param("PP 2", marks=pytest.mark.slow)])
def test_each_layer_or_the_mean_over_layers_reaches_the_budget(one_rank, two_ranks, layout):
    pool = one_rank if layout == "alone" else two_ranks
    overrides = [*BASE, *HOLDERS["top_p"][0], TWO, "model.router.p=0.7", *SPREAD.get(layout, [])]
    own = pool.run(train, overrides, 0, SETTLED + WINDOW)
    for layer in (0, 1):
        share = [rows[layer] / (GLOBAL_BATCH * LENGTH) for rows in own[0]["rows"][SETTLED:]]
        assert mean(share) == pytest.approx(2.0, rel=0.03)
    shared = pool.run(train, [*overrides, "budget.scope=global"], 0, SETTLED + WINDOW)
    assert mean(experts_per_token(shared[0])[SETTLED:]) == pytest.approx(2.0, rel=0.02)
    first, second = probabilities(shared)
    assert first == second
    first, second = probabilities(own)
    assert first != second


def probabilities(results) -> list[torch.Tensor]:
    """The p of both layers, which may be on different ranks."""
    state = {name: value for result in results for name, value in result["state"].items()}
    return [state[f"buffer layers.{layer}.moe.router.p"] for layer in (0, 1)]


def test_a_schedule_moves_the_budget_from_start_to_target(one_rank):
    schedule = ["budget.start=6", "budget.experts_per_token=2", "budget.over_steps=150"]
    (result,) = one_rank.run(train, [*BASE, *HOLDERS["top_p"][0], *schedule, "model.router.p=0.7"], 0, 200)
    observed = experts_per_token(result)
    assert mean(observed[65:85]) == pytest.approx(4.0, rel=0.1)
    assert mean(observed[165:]) == pytest.approx(2.0, rel=0.05)


@pytest.mark.parametrize("holder", ["top_p", "top_any loss-free"])
def test_controllers_agree_over_layouts_and_resume_bitwise(one_rank, two_ranks, tmp_path, holder):
    overrides = [*BASE, *HOLDERS[holder][0], *HOLDERS[holder][2], TWO]
    (alone,) = one_rank.run(train, overrides, 0, 10)
    spread = [*overrides, "train.micro_batch=4", "parallel.expert=2"]
    saved = str(tmp_path / "saved")
    straight = two_ranks.run(train, spread, 0, 10, "", saved, 6)
    assert straight[0]["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    assert straight[0]["rows"] == alone["rows"]
    resumed = two_ranks.run(train, spread, 6, 10, saved)
    for whole, half in zip(straight, resumed, strict=True):
        assert all(bool((value == half["state"][name]).all()) for name, value in whole["state"].items())


@pytest.mark.slow
def test_loss_free_thresholds_balance_the_load_too(one_rank):
    overrides = [*BASE, *IMPROVED, *HALF, TWO, "model.router.diversity_loss=0", "model.router.balance_loss=0"]
    spread = {}
    for method in ("pi", "loss_free"):
        (result,) = one_rank.run(train, [*overrides, f"budget.method={method}"], 0, SETTLED + WINDOW)
        spread[method] = [variation_of_load(result, layer) for layer in (0, 1)]
    assert max(spread["loss_free"]) < 0.5 * min(spread["pi"])


def variation_of_load(result, layer: int) -> float:
    """Coefficient of variation of the experts' load over the last steps; a statistics vector ends with the loads."""
    loads = sum(torch.tensor(vectors[layer][-16:]) for vectors in result["statistics"][SETTLED:])
    return (loads.std(correction=0) / loads.mean()).item()


@pytest.mark.slow
def test_biases_balance_top_k(one_rank):
    overrides = [*BASE, "model.router.kind=top_k", "model.router.balance_loss=0"]
    spread = {}
    for method in ("none", "loss_free", "quantile"):
        extra = ["budget.rate=0.01"] if method == "loss_free" else []
        (result,) = one_rank.run(train, [*overrides, f"budget.method={method}", *extra], 0, SETTLED + WINDOW)
        spread[method] = [variation_of_load(result, layer) for layer in (0, 1)]
        assert all(k == 2.0 for k in experts_per_token(result))
    assert max(spread["loss_free"]) < 0.5 * min(spread["none"])
    assert max(spread["quantile"]) < 0.5 * min(spread["none"])


def test_quantiles_hold_the_budget_from_the_first_step(one_rank):
    """192 tokens in a forward pass: within a few tokens of each of 16 experts."""
    overrides = [*BASE, "model.router.kind=quantile", "model.router.bins=128", TWO]
    (result,) = one_rank.run(train, overrides, 0, 100)
    observed = experts_per_token(result)
    assert mean(observed) == pytest.approx(2.0, rel=0.01)
    assert observed == pytest.approx([2.0] * 100, rel=0.05)


@pytest.mark.parametrize("kind", [pytest.param("relu", marks=pytest.mark.slow), "expert_threshold"])
def test_routers_with_their_own_update_rule_reach_the_budget(one_rank, kind):
    """They converge later and oscillate more than the controllers: within 10 %."""
    (result,) = one_rank.run(train, [*BASE, f"model.router.kind={kind}", TWO], 0, 250)
    assert mean(experts_per_token(result)[200:]) == pytest.approx(2.0, rel=0.1)


@pytest.mark.parametrize("layout", ["alone", pytest.param("PP 2", marks=pytest.mark.slow)])
def test_the_layers_of_dtop_p_share_one_p_and_one_budget(one_rank, two_ranks, layout):
    """Their scales differ, and so do their experts per token."""
    overrides = ["model.router.kind=dtop_p", "model.router.p=0.2", "budget.method=pi", "budget.scope=global"]
    pool = one_rank if layout == "alone" else two_ranks
    results = pool.run(train, [*BASE, *overrides, TWO, *SPREAD.get(layout, [])], 0, SETTLED + WINDOW)
    state = {name: value for result in results for name, value in result["state"].items()}
    p = [value.item() for name, value in state.items() if name.endswith("router.p")]
    assert len(p) == 2
    assert p[0] == p[1]
    assert abs(p[0] - 0.2) > 0.01
    scales = [value.item() for name, value in state.items() if name.endswith("router.scale")]
    assert len(set(scales)) == 2
    assert 1.0 not in scales
    assert mean(experts_per_token(results[0])[SETTLED:]) == pytest.approx(2.0, rel=0.03)
