"""Muon against torch's own, whose matrices are whole and two-dimensional."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dynmoe.train.muon import MuonAdamW, orthogonalize, rms_factor
from tests.engines.plain_muon import newton_schulz


@pytest.mark.parametrize("shape", [(3, 8, 20), (3, 20, 8), (2, 16, 16)])
def test_each_matrix_gets_singular_values_of_about_one(shape):
    x_NRC = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    made = orthogonalize(x_NRC)
    for matrix, ours in zip(x_NRC, made, strict=True):
        torch.testing.assert_close(ours.double(), newton_schulz(matrix), rtol=0, atol=1e-5)
        u, _, v = torch.linalg.svd(matrix, full_matrices=False)
        values = torch.linalg.svdvals(u.T @ ours @ v.T)
        assert 0.3 < values.min() <= values.max() < 1.3
    assert not orthogonalize(torch.zeros(shape)).any()


def test_bf16_matrices_agree_with_torch():
    """To the rounding of the last product; torch's own function takes one matrix at a time."""
    x_NRC = torch.randn(4, 24, 40, generator=torch.Generator().manual_seed(0)).bfloat16()
    weights = [nn.Parameter(torch.zeros(24, 40)) for _ in x_NRC]
    optimizer = torch.optim.Muon(weights, lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False)
    for weight, matrix in zip(weights, x_NRC, strict=True):
        weight.grad = matrix.float()
    optimizer.step()
    for weight, ours in zip(weights, orthogonalize(x_NRC), strict=True):
        torch.testing.assert_close(ours.float(), -weight.detach(), rtol=0.02, atol=2e-3)


def test_steps_agree_with_torch_muon_and_adamw():
    start = torch.randn(24, 40, generator=torch.Generator().manual_seed(1))
    ours, theirs = (nn.Parameter(start.clone()) for _ in range(2))
    our_bias, their_bias = (nn.Parameter(start[0].clone()) for _ in range(2))
    groups = [
        {"params": [ours], "muon": True, "weight_decay": 0.1},
        {"params": [our_bias], "muon": False, "weight_decay": 0.0},
    ]
    optimizer = MuonAdamW(groups, 0.9, lr=0.02)
    factor = rms_factor(*start.shape)
    optimizer.orthogonalize[0] = lambda momenta, gradients: [
        momentum.copy_(orthogonalize(momentum[None].bfloat16())[0].float() * factor) for momentum in momenta
    ]
    muon = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW([their_bias], lr=0.02, weight_decay=0.0)
    for step in range(5):
        gradient = torch.randn(24, 40, generator=torch.Generator().manual_seed(10 + step))
        for matrix, bias in ((ours, our_bias), (theirs, their_bias)):
            matrix.grad = gradient.clone()
            bias.grad = gradient[0].clone()
        optimizer.step()
        muon.step()
        adam.step()
    moved = (theirs - start).norm()
    assert (ours - theirs).norm() < 2e-3 * moved
    assert torch.equal(our_bias, their_bias)
    assert set(optimizer.state[ours]) == {"step", "exp_avg"}
