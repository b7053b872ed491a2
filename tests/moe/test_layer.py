"""The layer against a loop over tokens and experts, in one process and spread over ranks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynmoe.moe import MoEContext, MoELayer, StepState
from tests import oracles
from tests.moe.cases import (
    BASELINES,
    EXPERTS,
    HIDDEN,
    ROUTERS,
    bytes_on_the_wire,
    expert_parallel_equals_local,
    no_losses,
    ranks_reached,
    run_layer,
    spread_router,
    tiny_model,
)

ALL = ROUTERS | BASELINES


def make_layer(*overrides: str, seed: int = 0) -> MoELayer:
    layer = MoELayer(tiny_model(*overrides), 0, seed, MoEContext(step=StepState(recording=True, target_experts=1.5)))
    spread_router(layer, seed)
    return layer


def oracles_of_all(router, x, k: int) -> torch.Tensor:
    """Which of all experts, zero-computation ones included, each token selects."""
    selected_TX = torch.zeros(len(x), len(router.weight_ED), dtype=torch.bool)
    for token, probs in enumerate(router.linear(x, router.weight_ED).softmax(dim=1).tolist()):
        selected_TX[token, list(oracles.top_k_choice(probs, k))] = True
    return selected_TX


def loop_over_tokens(layer: MoELayer, x, upstream):
    """The same pass with the routing of the layer's router and the oracle's experts."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    plan = layer.router(x)
    factor = layer.settings.capacity_factor
    if factor is not None:
        capacity = max(1, -int(-factor * int(plan.routing_map_TE.sum()) // EXPERTS))
        plan = plan.mask(
            oracles.kept_under_capacity(plan.scores_TE, plan.routing_map_TE, capacity, layer.settings.drop_policy)
        )
    y = oracles.moe_output(x, plan.gates_TE, plan.routing_map_TE, layer.experts.w_up_EHD, layer.experts.w_down_EDF)
    if layer.shared is not None:
        y = y + layer.shared(x)
    if plan.local_TD is not None:
        y = y + plan.local_TD
    y.backward(upstream)
    zero = {name: torch.zeros_like(p) for name, p in layer.named_parameters()}
    gradients = {name: zero[name] if p.grad is None else p.grad.clone() for name, p in layer.named_parameters()}
    return {"y": y.detach(), "x": x.grad.clone(), **gradients}


@given(
    st.integers(0, 10**6), st.sampled_from(sorted(ALL)), st.integers(1, 9),
    st.sampled_from([[], ["model.moe.shared_hidden=8"], ["model.moe.capacity_factor=0.8"],
                     ["model.moe.capacity_factor=0.6", "model.moe.drop_policy=position"]]),
)  # fmt: skip
def test_output_and_gradients_equal_a_loop_over_tokens(seed, kind, tokens, extra):
    layer = make_layer(*ALL[kind], *no_losses(kind), *extra, seed=seed)
    if kind == "relu":
        layer.router.l1.zero_()
    generator = torch.Generator().manual_seed(seed)
    x, upstream = (torch.randn(tokens, HIDDEN, generator=generator) for _ in range(2))
    ours = run_layer(layer, x, upstream)
    oracle = loop_over_tokens(layer, x, upstream)
    for name, expected in oracle.items():
        torch.testing.assert_close(ours[name], expected, rtol=2e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", sorted(ALL))
def test_no_token_at_all(kind):
    layer = make_layer(*ALL[kind])
    result = run_layer(layer, torch.zeros(0, HIDDEN), torch.zeros(0, HIDDEN))
    assert result["y"].shape == (0, HIDDEN)
    assert all((result[name] == 0).all() for name in result if name.startswith("experts."))


def test_auxiliary_losses_reach_the_router_with_the_scale_of_the_main_loss():
    layer = make_layer(*ROUTERS["top_p"])
    x = torch.randn(12, HIDDEN)
    gradients = {}
    for scale in (1.0, 0.25):
        layer.zero_grad()
        layer.context.step = StepState(loss_scale=scale)
        layer(x).backward(torch.zeros(12, HIDDEN))
        gradients[scale] = layer.router.weight_ED.grad.clone()
    assert gradients[1.0].abs().max() > 0
    torch.testing.assert_close(gradients[0.25], gradients[1.0] * 0.25)
    losses = layer.router.losses(layer.router(x))
    expected = 1e-2 * losses["balance"] + 1e-4 * losses["entropy"]
    (direct,) = torch.autograd.grad(expected, layer.router.weight_ED)
    torch.testing.assert_close(gradients[1.0], direct)


def test_f18_capacity_holds_in_training_only_and_losses_see_the_selection():
    layer = make_layer(*ROUTERS["top_p"], "model.moe.capacity_factor=0.5")
    x = torch.randn(12, HIDDEN)
    limited = layer(x)
    vector = layer.drain().statistics()
    free = make_layer(*ROUTERS["top_p"])
    assert torch.equal(layer.eval()(x), free(x))
    assert not torch.equal(limited, free(x))
    # Both count the same losses: dropping routes is not the router's choice.
    assert torch.equal(vector[1:3], free.drain().statistics()[1:3] / 2)


@pytest.mark.parametrize("kind", ["top_p", "top_any"])
def test_the_limit_of_mean_experts_bounds_the_rows_of_a_training_pass(kind):
    limit = ["model.moe.max_mean_experts_per_token=1.25", "model.moe.on_overflow=drop"]
    x = torch.randn(10, HIDDEN, generator=torch.Generator().manual_seed(0))
    wide = [*ROUTERS[kind], "model.router.p=0.99"]
    free = make_layer(*wide)
    bounded = make_layer(*wide, *limit)
    assert torch.equal(bounded.eval()(x), free.eval()(x))
    free.train()(x)
    assert free.drain().routed_rows > 13
    bounded.train()(x).sum().backward()
    counted = bounded.drain()
    assert counted.routed_rows == 13  # 1.25 x 10, rounded up
    assert not counted.overflowed
    assert all(parameter.grad.isfinite().all() for parameter in bounded.parameters())


def test_exceeding_the_limit_without_dropping_is_flagged_and_stops_the_gradient():
    wide = [*ROUTERS["top_p"], "model.router.p=0.99"]
    x = torch.randn(10, HIDDEN, generator=torch.Generator().manual_seed(0))
    layer = make_layer(*wide, "model.moe.max_mean_experts_per_token=1.25")
    layer(x).sum().backward()
    counted = layer.drain()
    assert counted.routed_rows == 13
    assert counted.overflowed
    assert not layer.experts.w_up_EHD.grad.isfinite().all()
    layer.context.step = StepState(
        calibrating=True
    )  # nothing is trained, and the layers behind set thresholds from this output
    assert layer(x).isfinite().all()
    roomy = make_layer(*wide, "model.moe.max_mean_experts_per_token=4")
    assert torch.equal(roomy(x), make_layer(*wide)(x))
    assert not roomy.drain().overflowed


def test_evaluation_routes_like_training_and_counts_nothing():
    layer = make_layer(*ROUTERS["top_any"])
    x = torch.randn(9, HIDDEN)
    trained = layer(x)
    layer.drain()
    layer.eval()
    assert torch.equal(layer(x), trained)
    counted = layer.drain()
    assert counted.routed_rows == 0
    with pytest.raises(RuntimeError, match="no statistics were recorded; run a training pass"):
        counted.statistics()


def test_initial_experts_do_not_depend_on_who_holds_them():
    from dynmoe.moe.experts import GroupedExperts

    model = tiny_model()
    whole = GroupedExperts(model, range(EXPERTS), 3, "layers.0.moe.experts")
    part = GroupedExperts(model, range(2, 4), 3, "layers.0.moe.experts")
    assert torch.equal(whole.w_up_EHD[2:4], part.w_up_EHD)
    assert torch.equal(whole.w_down_EDF[2:4], part.w_down_EDF)
    assert all(parameter.allreduce is False for parameter in part.parameters())


@pytest.mark.parametrize("kind", [*sorted(ROUTERS), "quantile"])
def test_expert_parallel_equals_one_process(two_ranks, kind):
    # Auxiliary losses are means over ranks: the engines' tests compare them, with the average that engines take.
    overrides = [*ALL[kind], *no_losses(kind), "model.moe.shared_hidden=8"]
    for differences in two_ranks.run(expert_parallel_equals_local, overrides, [6, 5], None):
        assert max(differences.values()) < 1e-4, differences


@pytest.mark.parametrize("kind", [*sorted(ROUTERS), "identity_experts"])
def test_a_token_crosses_once_for_all_its_experts_of_a_rank(two_ranks, kind):
    """Zero-computation experts send nothing, so that a token with no other experts stays."""
    for sent, minimum in two_ranks.run(bytes_on_the_wire, ALL[kind], 30):
        assert sent == minimum > 0


GROUPED = {
    "top_k": ["model.router.k=4", "model.router.score_function=sigmoid"],
    "top_p": ["model.router.p=0.9"],
    "sigmoid": ["model.router.cutoff=0.3"],
    "top_any": [],
    "relu": ["budget.experts_per_token=2"],
}


@pytest.mark.parametrize("kind", GROUPED)
def test_a_token_reaches_as_many_ranks_as_it_may_use_groups(four_ranks, kind):
    """Each rank has one group of two experts, and a token may use two groups."""
    fields = [f"model.router.kind={kind}", *GROUPED[kind], "model.moe.experts=8"]
    free = four_ranks.run(ranks_reached, fields, 50)
    limited = four_ranks.run(ranks_reached, [*fields, "model.router.n_group=4", "model.router.topk_group=2"], 50)
    assert max(max(sent) for sent, _ in free) > 2
    assert max(max(sent) for sent, _ in limited) == 2
    experts = {count for _, counts in limited for count in counts}
    assert experts <= {0, 1, 2, 3, 4}
    assert len(experts) == 1 if kind == "top_k" else len(experts) > 1


def test_zero_computation_experts_compute_no_rows():
    overrides = ["model.router.kind=identity_experts", "model.router.k=4", "model.router.num_identity=4"]
    layer = make_layer(*overrides)
    x = torch.randn(40, HIDDEN, generator=torch.Generator().manual_seed(0))
    plan = layer.router(x)
    selected_TX = oracles_of_all(layer.router, x, 4)
    layer(x)
    assert layer.drain().routed_rows == selected_TX[:, :EXPERTS].sum() < 4 * 40
    assert torch.equal(plan.routing_map_TE, selected_TX[:, :EXPERTS])
