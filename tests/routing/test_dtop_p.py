"""DTop-p against its definition, token by token."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynmoe.moe import MoEContext
from dynmoe.moe.router import Router
from dynmoe.routing.top_p import normalized_logits
from tests import oracles
from tests.moe.cases import HIDDEN, tiny_model
from tests.routing.test_routers import chosen_sets, seeds


def by_hand(row: list[float], scale: float) -> list[float]:
    mean = sum(row) / len(row)
    variance = sum((logit - mean) ** 2 for logit in row) / len(row)
    powers = [math.exp(scale * (logit - mean) / math.sqrt(variance + 1e-5)) for logit in row]
    return [power / sum(powers) for power in powers]


@given(seeds, st.floats(0.1, 4.0), st.floats(0.1, 0.95), st.booleans())
def test_top_p_of_normalized_logits(seed, scale, p, renormalize):
    overrides = ["model.router.kind=dtop_p", f"model.router.p={p}", f"model.router.renormalize={renormalize}"]
    router = Router(tiny_model(*overrides, "model.moe.experts=6"), 6, seed, "router", MoEContext())
    with torch.no_grad():
        router.scale.fill_(scale)
        x_TD = 3.0 * torch.randn(12, HIDDEN, generator=torch.Generator().manual_seed(seed))
        plan = router(x_TD)
        rows = (x_TD @ router.weight_ED.T).tolist()
    for token, row in enumerate(rows):
        probs = by_hand(row, scale)
        best = oracles.descending(probs)
        sums = [sum(probs[e] for e in best[:count]) for count in range(7)]
        count = next(count for count in range(1, 7) if sums[count] >= p - 1e-5)
        chosen = set(best[:count])
        if abs(sums[count] - p) > 1e-5:  # rounding may decide otherwise
            assert chosen_sets(plan)[token] == chosen
            total = sum(probs[e] for e in chosen) if renormalize else 1.0
            expected = [probs[e] / total if e in chosen else 0.0 for e in range(6)]
            assert plan.gates_TE[token].tolist() == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_probabilities_do_not_depend_on_the_scale_of_logits_and_a_larger_scale_sharpens_them():
    logits = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    once, ten = (normalized_logits(factor * logits + 3.0, torch.tensor([1.5])) for factor in (1.0, 10.0))
    torch.testing.assert_close(once, ten, rtol=1e-4, atol=1e-4)
    peaks = [normalized_logits(logits, torch.tensor([s])).softmax(dim=1).amax(dim=1).mean() for s in (0.5, 1.0, 2.0)]
    assert peaks[0] < peaks[1] < peaks[2]


def test_equal_logits_give_finite_gradients():
    logits = torch.zeros(3, 4, requires_grad=True)
    scale = torch.ones(1, requires_grad=True)
    (normalized_logits(logits, scale).softmax(dim=1) * torch.arange(4.0)).sum().backward()
    assert torch.isfinite(logits.grad).all()
    assert torch.isfinite(scale.grad).all()


def test_the_defaults_are_the_papers():
    spec = tiny_model("model.router.kind=dtop_p").router.resolved
    assert (spec.renormalize, spec.balance_loss, spec.entropy_loss, spec.z_loss) == (True, 1e-4, 1e-3, 0.0)
