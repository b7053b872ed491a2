"""Routers with a given selection, and layers that take their routes from a replay."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dynmoe.config import load_config
from dynmoe.errors import ConfigError
from dynmoe.moe import MoEContext, MoELayer, StepState
from dynmoe.moe.layer import capture_plans
from dynmoe.moe.replay import DROPPED, ROUTED, RoutingReplay
from tests.moe.cases import BASELINES, EXPERTS, HIDDEN, ROUTERS, spread_router, tiny_model

TOKENS = 24
ALL = ROUTERS | BASELINES
SCORES = ["model.router.kind=top_any", "model.router.weights=score"]


def layer_of(*overrides: str, **step: object) -> MoELayer:
    layer = MoELayer(tiny_model(*overrides), 0, 0, MoEContext(step=StepState(**step)))
    spread_router(layer)
    return layer


def inputs(seed: int = 1) -> torch.Tensor:
    return torch.randn(2, TOKENS // 2, HIDDEN, generator=torch.Generator().manual_seed(seed))


def some_map(seed: int = 2) -> torch.Tensor:
    return torch.rand(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(seed)) < 0.4


@pytest.mark.parametrize("name", ALL)
def test_the_own_selection_gives_the_own_plan(name):
    """Values and gradients of every field, bitwise."""
    router = layer_of(*ALL[name], target_experts=2.0).router
    if router.spec.ADDS_OUTPUT:
        with pytest.raises(ConfigError, match=r"^train\.replay='runs/a': traces do not have the part of the output"):
            load_config(None, [*ALL[name], "train.replay=runs/a"])
        return
    x_TD = inputs().flatten(0, 1)
    own = router(x_TD, 2)
    again = router(x_TD, 2, selected_TE=own.selected_map_TE.clone())
    for field in dataclasses.fields(own):
        value, expected = getattr(again, field.name), getattr(own, field.name)
        assert (value is None) == (expected is None), field.name
        if expected is None:
            continue
        assert torch.equal(value, expected), field.name
        if expected.requires_grad:
            upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3))
            gradients = (
                torch.autograd.grad(made, list(router.parameters()), upstream, retain_graph=True, allow_unused=True)
                for made in (value, expected)
            )
            for ours, theirs in zip(*gradients, strict=True):
                assert (ours is None and theirs is None) or torch.equal(ours, theirs), field.name


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        (ROUTERS["top_k"], "score"),
        ([*ROUTERS["top_k"], "model.router.renormalize=true"], "share"),
        ([*ROUTERS["top_p"], "model.router.renormalize=true"], "share"),
        (BASELINES["sigmoid"], "score"),
        (BASELINES["relu"], "score"),
        (BASELINES["null_experts"], "share"),
        (ROUTERS["top_any"], "uniform"),
        (SCORES, "score"),
        ([*SCORES, "model.router.renormalize=true"], "share"),
    ],
)
def test_gates_of_a_given_selection_are_computed_token_by_token(fields, kind):
    router = layer_of(*fields).router
    map_TE = some_map()
    assert (map_TE.sum(dim=1) == 0).any()
    plan = router(inputs().flatten(0, 1), 2, selected_TE=map_TE)
    assert torch.equal(plan.routing_map_TE, map_TE)
    assert torch.equal(plan.selected_map_TE, map_TE)
    for token, scores in enumerate(plan.scores_TE.tolist()):
        chosen = [expert for expert in range(EXPERTS) if map_TE[token, expert]]
        total = sum(scores[expert] for expert in chosen) or 1.0
        for expert in range(EXPERTS):
            gate = {"score": scores[expert], "share": scores[expert] / total, "uniform": 1 / max(len(chosen), 1)}[kind]
            expected = gate if expert in chosen else 0.0
            assert plan.gates_TE[token, expert].item() == pytest.approx(expected, rel=1e-5)
    (gradient,) = torch.autograd.grad(plan.gates_TE.square().sum(), [next(iter(router.parameters()))])
    assert gradient.abs().sum() > 0, "no gradient flows through the gates"


@pytest.mark.parametrize(
    "limits",
    [["model.moe.capacity_factor=0.3"], ["model.moe.max_mean_experts_per_token=1"],
     ["model.moe.max_mean_experts_per_token=1", "model.moe.on_overflow=drop"]],
)  # fmt: skip
def test_a_layer_computes_the_replayed_routes_whatever_its_limits(limits):
    kinds_TE = torch.where(some_map(), ROUTED, 0).to(torch.uint8)
    kinds_TE[some_map(4) & (kinds_TE == 0)] = DROPPED
    replay = RoutingReplay()
    replay.add(0, 0, kinds_TE)
    layer = layer_of(*ROUTERS["top_p"], *limits, replay=replay)
    free = layer_of(*ROUTERS["top_p"])
    free.load_state_dict(layer.state_dict())
    with capture_plans([layer]) as plans:
        y = layer(inputs())
    assert torch.equal(plans[0].selected_map_TE, kinds_TE > 0)
    x_TD = inputs().flatten(0, 1)
    scores_TE = free.router(x_TD, 2).scores_TE
    for token in range(TOKENS):
        expected = torch.zeros(HIDDEN)
        for expert in range(EXPERTS):
            if kinds_TE[token, expert] == ROUTED:
                expected += scores_TE[token, expert] * expert_output(layer, expert, x_TD[token])
        torch.testing.assert_close(y.flatten(0, 1)[token], expected, rtol=1e-4, atol=1e-5)
    assert not layer.drain().overflowed


def expert_output(layer: MoELayer, expert: int, x_D: torch.Tensor) -> torch.Tensor:
    """SwiGLU of one token."""
    gate_up_H = layer.experts.w_up_EHD[expert] @ x_D
    gate_F, up_F = gate_up_H.chunk(2)
    return layer.experts.w_down_EDF[expert] @ (torch.nn.functional.silu(gate_F) * up_F)
