"""Quantile balancing of top-k against Megatron-Core's own update, and against a sort (see tests/golden)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from dynmoe.routers import TopK
from dynmoe.routers.base import BudgetStep
from dynmoe.routing.histogram import NUM_BINS, distances_at, log_places
from dynmoe.routing.selection import rank_descending
from dynmoe.routing.top_k import margin_histogram, quantile_bias
from dynmoe.routing.update_statistics import UpdateStatistics
from tests.routing.test_golden import GOLDEN
from tests.routing.test_routers import random_logits, seeds

MEGATRON = load_file(GOLDEN / "megatron_quantile.safetensors")
CASES = {"softmax": (2, 1.0), "sigmoid": (3, 1.0), "average": (2, 0.25)}  # k, and 1 - Megatron's memory
STEPS = 3


class State:
    def __init__(self, bias_E: torch.Tensor) -> None:
        self.bias_E = bias_E.clone()


def updated(bias_E: torch.Tensor, scores_TE: torch.Tensor, k: int, rate: float | None, parts: int = 1) -> torch.Tensor:
    """The biases after one step of the router."""
    histogram_EC = sum(margin_histogram(part, bias_E, k) for part in scores_TE.chunk(parts))
    tokens = torch.tensor(float(len(scores_TE)))
    seen = UpdateStatistics(tokens, torch.zeros(len(bias_E)), histogram_EC=histogram_EC.double())
    state = State(bias_E)
    TopK(k=k).update(state, seen, BudgetStep("quantile", 0.0, 0.0, rate, tokens, None))
    return state.bias_E


def margins(scores_TE: torch.Tensor, bias_E: torch.Tensor, k: int) -> torch.Tensor:
    ranked_TE = scores_TE + bias_E
    return ranked_TE - ranked_TE.sort(dim=1, descending=True).values[:, k : k + 1]


def beside(value_E: torch.Tensor, bins: int) -> torch.Tensor:
    """The value that lies one bin further."""
    return distances_at((log_places(value_E) + bins / NUM_BINS).clamp(0, 1)).float()


@pytest.mark.parametrize("case", CASES)
def test_biases_equal_megatrons_up_to_the_width_of_a_bin(case):
    """From Megatron's biases of the step before. Megatron's own is the margin of the next token in a sort.

    Ours lies between the margins of the last token that is wanted and that next one, or less than a bin beside them.
    """
    k, rate = CASES[case]
    before_E = torch.zeros(MEGATRON[f"{case}.0.scores"].shape[1])
    for step in range(STEPS):
        scores_TE = MEGATRON[f"{case}.{step}.scores"]
        chosen_TE = rank_descending(scores_TE + before_E) < k
        assert torch.equal(chosen_TE.nonzero()[:, 1].view(-1, k).int(), MEGATRON[f"{case}.{step}.indices"])
        wanted = len(scores_TE) * k // len(before_E)
        sorted_TE = margins(scores_TE, before_E, k).sort(dim=0, descending=True).values
        last_E, next_E = sorted_TE[wanted - 1], sorted_TE[wanted]
        theirs_E = MEGATRON[f"{case}.{step}.bias"]
        exact_E = before_E - rate * next_E
        torch.testing.assert_close(theirs_E, exact_E - exact_E.mean())
        ours_E = updated(before_E, scores_TE, k, rate)
        low_E = before_E - rate * beside(last_E, 1)
        high_E = before_E - rate * beside(next_E, -1)
        room = max((exact_E - low_E).mean(), (high_E - exact_E).mean())  # of the mean, which is subtracted
        assert (ours_E + exact_E.mean() >= low_E - room - 1e-6).all()
        assert (ours_E + exact_E.mean() <= high_E + room + 1e-6).all()
        assert (ours_E - theirs_E).abs().mean() < 0.02 * theirs_E.std()
        before_E = theirs_E


@given(seeds, st.integers(16, 300), st.integers(2, 8), st.data(), st.integers(1, 3))
def test_the_new_bias_gives_each_expert_its_share_at_the_old_cutoffs(seed, tokens, experts, data, parts):
    k = data.draw(st.integers(1, experts - 1))
    scores_TE = random_logits(seed, (tokens, experts)).softmax(dim=1)
    bias_E = 0.1 * torch.randn(experts, generator=torch.Generator().manual_seed(seed))
    counts_EC = sum(margin_histogram(part, bias_E, k) for part in scores_TE.chunk(parts))
    fall_E = (bias_E - quantile_bias(bias_E, counts_EC, k)).float()
    margins_TE = margins(scores_TE, bias_E, k)
    # Moved by one bin to either side, the bias gives at least and at most the share.
    assert ((margins_TE > beside(fall_E, -2)).sum(dim=0) >= tokens * k / experts - 1).all()
    assert ((margins_TE > beside(fall_E, 2)).sum(dim=0) <= tokens * k / experts + 1).all()


def test_biases_are_centered_and_every_expert_may_be_selected():
    scores_TE = random_logits(0, (64, 4)).softmax(dim=1)
    for k in range(1, 5):
        bias_E = updated(torch.full((4,), 7.0), scores_TE, k, None)
        assert torch.isfinite(bias_E).all()
        assert bias_E.sum().abs() < 1e-5


def test_a_rate_is_a_share_of_the_way():
    scores_TE = random_logits(0, (256, 4)).softmax(dim=1)
    bias_E = torch.tensor([0.2, -0.1, 0.0, -0.1])
    whole_E = updated(bias_E, scores_TE, 1, None)
    torch.testing.assert_close(updated(bias_E, scores_TE, 1, 0.25), 0.75 * bias_E + 0.25 * whole_E)


def test_loads_become_equal_within_few_steps():
    """One stream of skewed logits, 64 experts, top-8, 8,192 tokens per step."""
    generator = torch.Generator().manual_seed(0)
    skew_E = torch.randn(64, generator=generator)
    bias_E = torch.zeros(64)
    ratios = []
    for _ in range(8):
        scores_TE = (skew_E + torch.randn(8192, 64, generator=generator)).softmax(dim=1)
        load_E = (rank_descending(scores_TE + bias_E) < 8).sum(dim=0).double()
        ratios.append((load_E.max() / load_E.mean()).item())
        bias_E = updated(bias_E, scores_TE, 8, None)
    assert ratios[0] > 4
    assert max(ratios[4:]) < 1.15
