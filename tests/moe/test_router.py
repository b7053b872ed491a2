"""The router module: what its variant promises, thresholds from first scores, state that keeps its precision."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynmoe.moe import MoEContext, MoELayer, StepState
from dynmoe.moe.calibration import thresholds_for_share
from tests.moe.cases import BASELINES, HIDDEN, ROUTERS, spread_router, tiny_model

IMPROVED = ["model.router.kind=top_any", "model.router.variant=improved"]


def layer_of(*overrides: str) -> MoELayer:
    return MoELayer(tiny_model(*overrides), 0, 0, MoEContext())


@pytest.mark.parametrize("overrides", [IMPROVED, [*IMPROVED, "model.router.temperature=learned"],
                                       [*ROUTERS["top_p"], "model.router.variant=improved"]])  # fmt: skip
def test_every_trained_parameter_gets_a_gradient(overrides):
    """Among them the weights of all experts, and the threshold of each expert that some token selects."""
    layer = layer_of(*overrides)
    spread_router(layer)
    x = torch.randn(40, HIDDEN, generator=torch.Generator().manual_seed(1))
    assert layer.router(x).routing_map_TE.any(dim=0).all()
    layer(x).backward(torch.randn(40, HIDDEN, generator=torch.Generator().manual_seed(2)))
    for name, parameter in layer.named_parameters():
        per_expert = parameter.grad.movedim(1 if name.endswith("DE") else 0, 0).flatten(1) if parameter.dim() > 1 else (
            parameter.grad.view(-1, 1))  # fmt: skip
        assert per_expert.abs().sum(dim=1).gt(0).all(), name


def test_the_improved_variant_reaches_the_threshold_of_an_expert_that_nobody_selects():
    """By its load loss, with the coefficients that it has by default: the threshold falls."""
    layer = layer_of(*IMPROVED, "model.router.min_experts=0")
    with torch.no_grad():
        layer.router.thresholds_E[2] = 1.0
    x = torch.randn(20, HIDDEN)
    assert not layer.router(x).routing_map_TE[:, 2].any()
    layer(x).backward(torch.zeros(20, HIDDEN))
    assert layer.router.thresholds_E.grad[2] > 0  # a step against it lowers the threshold


@pytest.mark.parametrize("variant", ["paper", "improved"])
def test_a_loss_on_the_choice_reaches_thresholds_that_no_token_exceeds(variant):
    """The straight-through step promises it; the released one ends that gradient with its ReLU."""
    for straight_through, promised in (("all", True), ("selected", False)):
        layer = layer_of(
            "model.router.kind=top_any", f"model.router.variant={variant}", "model.router.efficiency_loss=1",
            "model.router.diversity_loss=0", "model.router.simplicity_loss=0", "model.router.balance_loss=0",
            f"model.router.straight_through={straight_through}", "model.router.min_experts=0",
        )  # fmt: skip
        with torch.no_grad():
            layer.router.thresholds_E[2] = 1.0  # no cosine is larger
        x = torch.randn(20, HIDDEN)
        assert not layer.router(x).routing_map_TE[:, 2].any()
        layer(x).backward(torch.zeros(20, HIDDEN))
        assert (layer.router.thresholds_E.grad[2] != 0) == promised
        assert (layer.router.prototypes_DE.grad[:, 2] != 0).any() == promised


def test_the_balance_loss_of_sigmoid_scores_is_that_of_deepseek_v3():
    """Equations 17 to 20, one sequence and expert at a time."""
    layer = layer_of(*BASELINES["top_k grouped"], "model.router.balance_scope=sequence")
    spread_router(layer)
    x = torch.randn(3 * 7, HIDDEN, generator=torch.Generator().manual_seed(1))
    plan = layer.router(x, 3)
    scores = torch.sigmoid(x @ layer.router.weight_ED.detach().T).double().view(3, 7, 4)
    expected = 0.0
    for sequence in range(3):
        for expert in range(4):
            selected = int(plan.routing_map_TE.view(3, 7, 4)[sequence, :, expert].sum())
            share = sum(float(row[expert] / row.sum()) for row in scores[sequence]) / 7
            expected += 4 / (2 * 7) * selected * share / 3
    assert layer.router.losses(plan)["balance"].item() == pytest.approx(expected, rel=1e-5)


@given(st.integers(0, 10**6), st.integers(1, 60), st.integers(1, 5), st.floats(0.02, 1.0))
def test_a_threshold_lets_its_share_of_tokens_in(seed, tokens, experts, share):
    values = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed))
    thresholds = thresholds_for_share(values, share, None)
    allowed = share * tokens
    for expert in range(experts):
        column = values[:, expert]
        assert int((column > thresholds[expert]).sum()) <= allowed + 1e-4
        # Any lower and one more would pass.
        next_down = column[column <= thresholds[expert]]
        if len(next_down):
            assert int((column >= next_down.max()).sum()) > allowed - 1e-4


@pytest.mark.parametrize("overrides", [BASELINES["sigmoid grouped"], [*IMPROVED, "model.router.n_group=2"]])
@pytest.mark.parametrize("wanted", [0.5, 1.5])
def test_calibration_counts_what_tokens_select_within_their_groups(overrides, wanted):
    layer = layer_of(*overrides, f"model.router.initial_experts={wanted}", "model.router.min_experts=0")
    x = torch.randn(400, HIDDEN, generator=torch.Generator().manual_seed(1))
    layer.context.step = StepState(calibrating=True)
    layer(x)
    assert layer.router(x).experts_per_token_T.float().mean().item() == pytest.approx(wanted, abs=0.02)


@pytest.mark.parametrize("overrides", [IMPROVED, BASELINES["expert_threshold"],
                                       ["model.router.kind=sigmoid", "model.router.cutoff=0.7"]])  # fmt: skip
def test_calibration_gives_the_wanted_experts_per_token_once(overrides):
    layer = layer_of(*overrides, "model.router.initial_experts=1.5", "model.router.min_experts=0")
    x = torch.randn(400, HIDDEN, generator=torch.Generator().manual_seed(1))
    layer.context.step = StepState(calibrating=True)
    layer(x)
    assert layer.router(x).experts_per_token_T.float().mean().item() == pytest.approx(1.5, abs=0.02)
    assert layer.router(x).tokens_per_expert_E.tolist() == pytest.approx([150] * 4, abs=2)
    before = layer.router.offset_E.clone()
    layer(x[:7])
    assert torch.equal(layer.router.offset_E, before), "set a second time"
    assert not layer.drain().recorded


def test_state_keeps_its_precision_where_weights_are_cast():
    layer = layer_of(*ROUTERS["top_p"], "budget.method=pi", "budget.experts_per_token=2")
    layer.router.p.fill_(0.1234567)
    layer.bfloat16()
    assert layer.router.weight_ED.dtype == torch.bfloat16
    assert layer.router.p.dtype == layer.router.error.dtype == torch.float32
    assert layer.router.p.item() == pytest.approx(0.1234567, rel=1e-6)
    layer.to("meta")
    assert layer.router.p.device.type == "meta"


def test_the_scale_of_cosines():
    def factor(*overrides: str):
        router = layer_of(*overrides).router
        return router.spec.factor(router)

    assert factor("model.router.kind=top_any", "model.router.scale=3") == 3.0
    assert factor(*IMPROVED, "model.router.scale=0.5") == 0.5 * HIDDEN**0.5
    learned = factor(*IMPROVED, "model.router.temperature=learned")
    assert learned.item() == pytest.approx(HIDDEN**0.5)
    assert learned.requires_grad


def test_the_balance_counts_the_step_so_far():
    """With two micro-batches the second one's loss weighs the load of both, as one pass over both would."""
    layer = layer_of("model.router.kind=top_k")
    spread_router(layer)
    x = torch.randn(24, HIDDEN)
    whole = layer.router(x)
    share = whole.selected_map_TE.float().mean(dim=0) / 2
    layer.router.losses(layer.router(x[:12]))
    layer.context.step = StepState(micro_batch=1)
    second = layer.router(x[12:])
    expected = 4 * (share * second.scores_TE.mean(dim=0)).sum()
    torch.testing.assert_close(layer.router.losses(second)["balance"], expected)
    # A repeated pass (activation recomputation) finds its counts, those of the first pass too, and adds nothing.
    with layer.context.override(micro_batch=1, recomputing=True):
        torch.testing.assert_close(layer.router.losses(second)["balance"], expected)
    with layer.context.override(micro_batch=0, recomputing=True):
        first = layer.router(x[:12])
        alone = 4 * (first.selected_map_TE.float().mean(dim=0) / 2 * first.scores_TE.mean(dim=0)).sum()
        torch.testing.assert_close(layer.router.losses(first)["balance"], alone)
    assert layer.context.step == StepState(micro_batch=1)
    layer.context.step = StepState()
    torch.testing.assert_close(layer.router.losses(whole)["balance"], 4 * (share * whole.scores_TE.mean(dim=0)).sum())


@pytest.mark.parametrize("scope", ["micro_batch", "sequence"])
def test_narrower_scopes_of_the_balance(scope):
    layer = layer_of("model.router.kind=top_k", f"model.router.balance_scope={scope}")
    spread_router(layer)
    x = torch.randn(2, 6, HIDDEN)
    layer.context.step = StepState(micro_batch=1)  # makes no difference here
    found = layer.router.losses(layer.router(x.view(12, HIDDEN), num_sequences=2))["balance"]
    parts = [x.view(12, HIDDEN)] if scope == "micro_batch" else list(x)
    alone = [layer.router(part) for part in parts]
    expected = [4 * (plan.selected_map_TE.float().mean(dim=0) / 2 * plan.scores_TE.mean(dim=0)).sum() for plan in alone]
    torch.testing.assert_close(found, torch.stack(expected).mean())


def test_capacity_follows_the_average_of_earlier_steps():
    layer = layer_of(*ROUTERS["top_k"], "model.moe.capacity_factor=1.0")
    spread_router(layer)
    x = torch.randn(40, HIDDEN)
    layer(x)
    first = layer._within_capacity(layer.router(x))
    assert first.tokens_per_expert_E.max() <= 20  # 40 tokens x 2 experts over 4
    layer.router.experts_per_token.fill_(1.0)
    later = layer._within_capacity(layer.router(x))
    assert later.tokens_per_expert_E.max() == 10
    assert (later.selected_map_TE & ~later.routing_map_TE).sum() + later.routing_map_TE.sum() == 80


@pytest.mark.parametrize("kind", ["top_p", "top_any"])
def test_a_users_autocast_does_not_reach_the_router(kind):
    router = layer_of(*ROUTERS[kind]).router
    x_TD = torch.randn(32, HIDDEN, generator=torch.Generator().manual_seed(0))
    expected = router(x_TD)
    with torch.autocast("cpu", torch.bfloat16):
        found = router(x_TD)
    assert torch.equal(found.scores_TE, expected.scores_TE)
    assert torch.equal(found.gates_TE, expected.gates_TE)
