"""The numbers of collectives and of device-to-host reads per step do not grow with the number of layers."""

from __future__ import annotations

from collections import Counter
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from dynmoe.moe import MoEContext, MoEGroups, MoELayer, StepState
from dynmoe.moe.counts import PendingCounts
from harness.collectives import LAYOUTS, count_steps
from tests.moe.cases import HIDDEN, ROUTERS, spread_router, tiny_model

# Our collectives: loss and norm; the step's routing observations, or with pipelines the budget of all stages; the
# counts of each of two micro-batches where ranks share them. A logged step adds its report.
COLLECTIVES = {"deepspeed, data": 4, "megatron, data": 4, "megatron, pipeline": 2}


def totals(counts: Counter[tuple[str, str, str]]) -> dict[tuple[str, str], int]:
    found = Counter[tuple[str, str]]()
    for (kind, whose, _), count in counts.items():
        found[kind, whose] += count
    return dict(found)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_collectives_and_host_reads_of_a_step_do_not_grow_with_the_layers(two_ranks, layout):
    few, many = (two_ranks.run(count_steps, layout, layers) for layers in (2, 4))
    for own, more in zip(few, many, strict=True):
        for step, added in (("plain", 0), ("logged", 1)):
            seen = totals(own[step])
            assert seen == totals(more[step]), (own[step], more[step])
            assert seen["collectives", "ours"] == COLLECTIVES[layout] + added, own[step]
            assert seen["host_reads", "ours"] == 1 + 2 * added, own[step]


def layers_of(overrides: list[str], group: dist.ProcessGroup | None) -> list[MoELayer]:
    context = MoEContext(MoEGroups(tokens=group), step=StepState(recording=True))
    layers = [MoELayer(tiny_model(*overrides), number, 0, context) for number in range(2)]
    for layer in layers:
        spread_router(layer)
    return layers


def counted_pass(overrides: list[str]) -> dict[str, Any]:
    """Passes tokens through two layers without an engine: on two ranks, and in one process with the tokens of both."""
    tokens = torch.randn(2, 12, HIDDEN, generator=torch.Generator().manual_seed(0))
    ours = layers_of(overrides, dist.group.WORLD)
    alone = layers_of(overrides, None)
    loss_at_first = []
    losses = ours[0].router.losses

    def kept(*arguments: Any) -> dict[str, torch.Tensor]:
        found = losses(*arguments)
        loss_at_first.append(found["balance"])
        return found

    ours[0].router.losses = kept  # type: ignore[method-assign]
    with (
        patch.object(dist, "all_reduce", wraps=dist.all_reduce) as all_reduce,
        patch.object(PendingCounts, "get", autospec=True, side_effect=PendingCounts.get) as get,
    ):
        y = ours[1](ours[0](tokens[dist.get_rank()]))
        known = not bool(loss_at_first[0].isnan())
        waits = get.call_count
        before = all_reduce.call_count
        y.backward(torch.zeros_like(y))
        after = all_reduce.call_count
    alone[1](alone[0](tokens.flatten(0, 1))).backward(torch.zeros(24, HIDDEN))
    differences = []
    for layer, other in zip(ours, alone, strict=True):
        for parameter, expected in zip(layer.router.parameters(), other.router.parameters(), strict=True):
            dist.all_reduce(parameter.grad)
            differences.append(
                (parameter.grad / 2 - expected.grad).abs().max().item() / expected.grad.abs().max().item()
            )
    statistics = ours[0].drain().statistics()
    dist.all_reduce(statistics)
    return {
        "known": known, "waits": waits, "reduced": (before, after), "difference": max(differences),
        "balance": statistics[1].item() / 2, "expected": alone[0].drain().statistics()[1].item(),
        "value": loss_at_first[0].item(), "own": ours[0].router.loss_coefficients,
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["top_p", "top_any"])
def test_a_forward_pass_waits_for_no_counts_and_a_backward_pass_reduces_all_at_once(two_ranks, kind):
    overrides = [*ROUTERS[kind], "model.router.balance_loss=1e-2"]
    first, second = two_ranks.run(counted_pass, overrides)
    for found in (first, second):
        assert not found["known"]
        assert found["waits"] == 0
        assert found["reduced"] == (0, 1), "the counts of two layers in one all-reduce"
        assert found["difference"] < 1e-5
        assert found["balance"] == pytest.approx(found["expected"], rel=1e-5)
    assert (first["value"] + second["value"]) / 2 == pytest.approx(first["expected"], rel=1e-5)
