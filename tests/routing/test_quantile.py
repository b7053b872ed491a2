"""Quantile routing against a sort of each expert's logits, token by token."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynmoe.routing.histogram import distances_at, log_places
from dynmoe.routing.quantile import quantile_choice, quantile_histogram, quantile_thresholds
from tests.routing.test_routers import chosen_sets, random_logits, seeds, sizes

TOKENS = 16384
EXPERTS = 32
K = 4


def shapes(seed: int) -> dict[str, torch.Tensor]:
    """Logits [T, E] of several distributions, each expert at its own place and scale."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(TOKENS, EXPERTS, generator=generator)
    uniform = torch.rand(TOKENS, EXPERTS, generator=generator)
    shift = 3 * torch.randn(EXPERTS, generator=generator)
    scale = torch.logspace(-3, 2, EXPERTS)
    return {
        "normal": shift + scale * normal,
        "skewed": shift + scale * normal.exp(),
        "long tail": shift - scale * uniform.log(),
        "bimodal": shift + scale * torch.where(uniform < 0.9, normal - 5, normal + 5),
        "two far modes": shift + scale * torch.where(uniform < 0.5, 0.1 * normal, 0.1 * normal + 40),
    }


def thresholds_of(logits_TE: torch.Tensor, last_E: torch.Tensor, share: float, bins: int = 1024, parts: int = 1):
    counts = sum(quantile_histogram(part, last_E, bins) for part in logits_TE.chunk(parts))
    return quantile_thresholds(counts, share, last_E)


@given(seeds, sizes, st.booleans())
def test_each_expert_takes_the_tokens_above_its_own_threshold(seed, shape, renormalize):
    logits = random_logits(seed, shape).requires_grad_()
    thresholds = torch.randn(shape[1], generator=torch.Generator().manual_seed(seed))
    plan = quantile_choice(logits, thresholds, renormalize=renormalize)
    for token, row in enumerate(logits.tolist()):
        chosen = {e for e, logit in enumerate(row) if logit > thresholds[e].item()}
        assert chosen_sets(plan)[token] == chosen
        assert bool(plan.unclaimed_T[token]) == (not chosen)
        scores = [1 / (1 + math.exp(-logit)) for logit in row]
        total = sum(scores[e] for e in chosen) if renormalize and chosen else 1.0
        expected = [score / total if e in chosen else 0.0 for e, score in enumerate(scores)]
        assert plan.gates_TE[token].tolist() == pytest.approx(expected, rel=1e-5)
    plan.gates_TE.sum().backward()
    assert torch.isfinite(logits.grad).all()


def test_large_logits_are_told_apart():
    """Their sigmoids are all 1."""
    plan = quantile_choice(torch.tensor([[30.0], [40.0]]), torch.tensor([35.0]))
    assert plan.routing_map_TE.tolist() == [[False], [True]]


@pytest.mark.parametrize("name", shapes(0))
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("stale", [1.0, 0.5, 2.0])
def test_every_expert_gets_its_share_of_the_tokens(name, seed, stale):
    """Within 2 % of a sort of all tokens, which gives exactly T K / E; and so is the mean of K.

    The bins lie around the quantiles of other tokens, for this load or for half or twice as much.
    """
    logits = shapes(seed)[name]
    other = shapes(seed + 100)[name] - shapes(seed + 100)[name].mean(dim=0) + logits.mean(dim=0)
    last = other.quantile(1 - stale * K / EXPERTS, dim=0)
    plan = quantile_choice(logits, thresholds_of(logits, last, K / EXPERTS))
    wanted = TOKENS * K // EXPERTS
    for expert, load in enumerate(plan.tokens_per_expert_E.tolist()):
        assert abs(load - wanted) <= 0.02 * wanted, (name, expert, load)
        best = logits[:, expert].argsort(descending=True)
        taken = plan.routing_map_TE[:, expert]
        assert taken[best[: int(0.98 * wanted)]].all()
        assert not taken[best[int(1.02 * wanted) + 1 :]].any()
    assert plan.experts_per_token_T.double().mean().item() == pytest.approx(K, rel=0.02)


@given(seeds, st.integers(40, 400), st.integers(1, 5), st.floats(0.02, 0.98), st.sampled_from([16, 100, 1024]),
       st.integers(1, 4), st.floats(-3, 3))  # fmt: skip
def test_the_threshold_lies_in_the_bin_of_the_exact_quantile(seed, tokens, experts, share, bins, parts, offset):
    """However the tokens are split, and wherever the bins lie."""
    logits = random_logits(seed, (tokens, experts)).exp()
    last = torch.full((experts,), offset)
    found = log_places(thresholds_of(logits, last, share, bins, parts) - last)
    rank = max(math.ceil(share * tokens - 1e-9), 1)
    exact = log_places(logits.sort(dim=0, descending=True).values[rank - 1] - last)
    assert ((found - exact).abs() <= 1 / bins + 1e-5).all()


def test_equal_logits_pass_or_fail_together_and_nothing_is_infinite():
    last = torch.tensor([-1.0, 0.0, 1.0])
    for tokens in (0, 100):
        for share in (0.0, 0.3, 1.0):
            logits = torch.zeros(tokens, 3)
            thresholds = thresholds_of(logits, last, share, 16)
            assert torch.isfinite(thresholds).all()
            assert set(quantile_choice(logits, thresholds).tokens_per_expert_E.tolist()) <= {0, tokens}


@given(st.floats(-1e4, 1e4))
def test_places_on_the_logarithmic_scale_can_be_inverted(distance):
    place = log_places(torch.tensor(distance))
    assert 0.0 <= place <= 1.0
    assert distances_at(place).item() == pytest.approx(distance, rel=1e-4, abs=1e-10)
