"""F15 to F17: extreme routing, in which ranks and experts have all tokens or none."""

from __future__ import annotations

import functools
import math

import pytest
import torch

from dynmoe.moe import MoEContext, MoELayer
from dynmoe.routing import top_any, top_k, top_p
from tests import oracles
from tests.engines.cases import GLOBAL_BATCH, LENGTH
from tests.faults.routing_cases import PREFERENCES, steered_pass, train_steered
from tests.moe.cases import BASELINES, ROUTERS, expert_parallel_equals_local, no_losses, spread_router, tiny_model

TOKENS = GLOBAL_BATCH * LENGTH
ALONE = ["train.micro_batch=2"]
SPREAD = {
    "deepspeed": ["train.micro_batch=1", "parallel.expert=2"],
    "megatron": ["engine=megatron", "train.micro_batch=1", "parallel.expert=2"],
}
# Routers for which the preference determines the experts of a token.
ONE = ROUTERS | {"top_k": ["model.router.kind=top_k", "model.router.k=1"]}
ALL = {
    "top_k": ["model.router.kind=top_k", "model.router.k=4"],
    "top_p": ["model.router.kind=top_p", "model.router.p=1.0"],
    "top_any": ROUTERS["top_any"],
    "relu": BASELINES["relu"],
}


@pytest.fixture(scope="module")
def alone(one_rank):
    @functools.cache
    def run(where: str, *router: str):
        return one_rank.run(train_steered, [*ALONE, *router], PREFERENCES[where])[0]

    return run


def trains_like_one_process(pool, engine: str, where: str, router: list[str], alone) -> list[int]:
    """Compares three steps on two ranks with one; returns the rows that each layer computed in the first."""
    results = pool.run(train_steered, [*SPREAD[engine], *router], PREFERENCES[where])
    expected = alone(where, *router)
    for result in results:
        assert result["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert result["norms"] == pytest.approx(expected["norms"], rel=1e-5)
        assert all(math.isfinite(norm) and norm > 0 for norm in result["norms"])
        assert result["rows"] == expected["rows"]
    first, second = (result["collectives"] for result in results)
    assert len(first) > 10, "collectives were not recorded"
    assert first == second
    return list(expected["rows"][0].values())


@pytest.mark.parametrize("kind", sorted(ONE))
@pytest.mark.parametrize(
    ("engine", "where"),
    [
        ("deepspeed", "an expert of the first rank"),
        ("megatron", "an expert of the second rank"),
        pytest.param("deepspeed", "an expert of the second rank", marks=pytest.mark.slow),
        pytest.param("megatron", "an expert of the first rank", marks=pytest.mark.slow),
    ],
)
def test_f15_all_tokens_select_one_expert(two_ranks, alone, engine, kind, where):
    assert trains_like_one_process(two_ranks, engine, where, ONE[kind], alone) == [TOKENS] * 2


@pytest.mark.parametrize("kind", sorted(ROUTERS))
@pytest.mark.parametrize("engine", ["deepspeed", pytest.param("megatron", marks=pytest.mark.slow)])
def test_f15_all_tokens_select_the_experts_of_one_rank(two_ranks, alone, engine, kind):
    rows = trains_like_one_process(two_ranks, engine, "the experts of one rank", ROUTERS[kind], alone)
    assert all(TOKENS <= count <= 2 * TOKENS for count in rows)


@pytest.mark.parametrize(
    ("kind", "tokens", "steer_to"),
    [
        *((kind, [7, 0], None) for kind in sorted(ROUTERS)),  # a rank without tokens
        *((kind, [0, 0], None) for kind in sorted(ROUTERS)),
        ("top_k", [6, 6], 0),  # every token's best expert on the first rank
        ("top_p", [6, 3], 3),  # every token on one expert of the second rank; the first computes nothing
    ],
)
def test_f15_expert_parallel_layer_equals_one_process(two_ranks, kind, tokens, steer_to):
    """Compares the output and the gradients of all parameters."""
    overrides = [*ROUTERS[kind], *no_losses(kind), "model.moe.shared_hidden=8"]
    for differences in two_ranks.run(expert_parallel_equals_local, overrides, tokens, steer_to):
        assert max(differences.values()) < 1e-4, differences


def test_f15_expert_without_a_token_has_a_zero_gradient():
    result = steered_pass(layer(ROUTERS["top_p"]), PREFERENCES["an expert of the second rank"], 9)
    for name in ("experts.w_up_EHD", "experts.w_down_EDF"):
        assert result[name].isfinite().all()
        assert result[name][3].abs().max() > 0
        assert (result[name][:3] == 0).all()


def layer(router: list[str], *overrides: str) -> MoELayer:
    made = MoELayer(tiny_model(*router, *overrides), 0, 0, MoEContext())
    spread_router(made)
    return made


@pytest.mark.parametrize("engine", sorted(SPREAD))
def test_f16_no_token_selects_an_expert(two_ranks, alone, engine):
    assert trains_like_one_process(two_ranks, engine, "nobody", ROUTERS["top_any"], alone) == [0, 0]


@pytest.mark.parametrize("kind", ["top_any", "relu", "expert_threshold"])
def test_f16_token_without_experts_keeps_residual_or_shared_expert(kind):
    """The output is zero, or that of the shared expert."""
    router = (ROUTERS | BASELINES)[kind]
    bare = steered_pass(layer(router), PREFERENCES["nobody"], 9)
    assert (bare["y"] == 0).all()
    assert all(value.isfinite().all() for value in bare.values())
    assert all((bare[name] == 0).all() for name in bare if name.startswith("experts."))
    with_shared = layer(router, "model.moe.shared_hidden=8")
    shared = steered_pass(with_shared, PREFERENCES["nobody"], 9)
    torch.testing.assert_close(shared["y"], with_shared.shared(shared["x_TD"]).detach())


def test_f16_token_without_experts_gets_its_best_one_with_min_experts():
    asking = layer(["model.router.kind=top_any", "model.router.min_experts=1"])
    result = steered_pass(asking, PREFERENCES["nobody"], 9)
    plan = asking.router(result["x_TD"])
    assert (plan.routing_map_TE.sum(dim=1) == 1).all()
    distances_TE = plan.logits_TE - asking.router.thresholds_E
    assert torch.equal(plan.routing_map_TE.int().argmax(dim=1), distances_TE.argmax(dim=1))
    assert (result["y"].abs().amax(dim=1) > 0).all()


@pytest.mark.parametrize("kind", sorted(ALL))
@pytest.mark.parametrize("engine", ["deepspeed", pytest.param("megatron", marks=pytest.mark.slow)])
def test_f17_all_tokens_select_all_experts(two_ranks, alone, engine, kind):
    assert trains_like_one_process(two_ranks, engine, "everybody", ALL[kind], alone) == [4 * TOKENS] * 2


@pytest.mark.parametrize("kind", sorted(ALL))
def test_f17_all_tokens_on_all_experts_equals_the_dense_sum(kind):
    """Compares with all experts computed for all tokens without routing."""
    made = layer(ALL[kind])
    result = steered_pass(made, PREFERENCES["everybody"], 9)
    x = result["x_TD"].clone().requires_grad_()
    made.zero_grad()
    plan = made.router(x)
    assert plan.routing_map_TE.all()
    gate_TEF, up_TEF = torch.einsum("td,ehd->teh", x, made.experts.w_up_EHD).chunk(2, dim=2)
    y_TED = torch.einsum("tef,edf->ted", torch.nn.functional.silu(gate_TEF) * up_TEF, made.experts.w_down_EDF)
    y_TD = (plan.gates_TE[..., None] * y_TED).sum(dim=1)
    y_TD.backward(result["upstream"])
    torch.testing.assert_close(result["y"], y_TD.detach(), rtol=1e-4, atol=1e-5)
    for name in ("experts.w_up_EHD", "experts.w_down_EDF"):
        torch.testing.assert_close(result[name], made.get_parameter(name).grad, rtol=1e-4, atol=1e-5)


INFINITE = float("-inf")
ROWS = [
    [0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 1.0], [INFINITE, 0.0, 0.0, INFINITE], [INFINITE, INFINITE, INFINITE, 2.0],
    [3.0, INFINITE, 3.0, -60.0],
]  # fmt: skip


@pytest.mark.parametrize(
    ("route", "choice"),
    [(lambda logits: top_k(logits, 2), lambda probs: oracles.top_k_choice(probs, 2)),
     (lambda logits: top_p(logits, 0.5), lambda probs: oracles.top_p_choice(probs, 0.5, "paper")),
     (lambda logits: top_p(logits, 1.0), lambda probs: oracles.top_p_choice(probs, 1.0, "paper"))],
    ids=["top_k", "top_p", "top_p of all"],
)  # fmt: skip
def test_f17_ties_and_minus_infinity_in_router_scores(route, choice):
    logits = torch.tensor(ROWS, requires_grad=True)
    plan = route(logits)
    assert [set(row.nonzero().flatten().tolist()) for row in plan.routing_map_TE] == [
        choice(row) for row in plan.scores_TE.tolist()
    ]
    torch.testing.assert_close(plan.gates_TE, torch.softmax(logits, dim=1).detach() * plan.routing_map_TE)
    assert (plan.gates_TE[torch.tensor(ROWS) == INFINITE] == 0).all()
    (plan.gates_TE * torch.arange(4)).sum().backward()
    assert logits.grad.isfinite().all()


def test_f17_top_any_scores_equal_to_the_threshold_select_no_expert():
    """A score equal to the threshold is not above it; with min_experts=1 the first expert is selected."""
    hidden = torch.ones(3, 4)
    prototypes = torch.zeros(4, 5)
    free, floor = (
        top_any(hidden, prototypes, torch.zeros(5), torch.ones(5, dtype=torch.bool), min_experts=least)
        for least in (0, 1)
    )
    assert not free.routing_map_TE.any()
    assert floor.routing_map_TE.tolist() == [[True, False, False, False, False]] * 3
    assert floor.gates_TE.isfinite().all()
