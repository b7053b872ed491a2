"""The importance of tokens in attention, and the router that spends experts by it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynmoe.errors import UserError
from dynmoe.hf.export import export
from dynmoe.model import Decoder
from dynmoe.model import importance as module
from dynmoe.model.documents import CausalMask
from dynmoe.model.importance import importance, own_weights
from dynmoe.moe import MoEContext, MoELayer
from dynmoe.moe.layer import capture_plans
from dynmoe.routing.da_moe import experts_by_importance
from tests import oracles
from tests.hf.cases import begin
from tests.moe.cases import ATTENTIVE, tiny_config, tiny_model
from tests.moe.test_causality import train_steps

VOCAB = 48


def by_the_definition(q, k, sequence: int, position: int, seen: list[int]) -> float:
    """Sum over heads of a position's weight on itself, times the number of positions that it attends to."""
    total = 0.0
    heads, kv_heads = q.shape[1], k.shape[1]
    for head in range(heads):
        query = q[sequence, head, position].tolist()
        keys = k[sequence, head * kv_heads // heads].tolist()
        weights = {j: math.exp(sum(a * b for a, b in zip(query, keys[j], strict=True)) / 2.0) for j in seen}
        total += len(seen) * weights[seen[-1]] / sum(weights.values())
    return total


@given(st.integers(0, 10**6), st.integers(1, 2), st.sampled_from([(1, 1), (4, 2), (3, 1)]), st.integers(1, 7))
def test_own_weights_position_by_position(seed, batch, heads, length):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads[0], length, 4, generator=generator)
    k = torch.randn(batch, heads[1], length, 4, generator=generator)
    found = own_weights(q, k)
    latest = own_weights(q[:, :, -1:], k)
    for sequence in range(batch):
        for position in range(length):
            expected = by_the_definition(q, k, sequence, position, list(range(position + 1)))
            assert found[sequence, position].item() == pytest.approx(expected, rel=1e-4)
        assert latest[sequence, 0].item() == pytest.approx(found[sequence, -1].item(), rel=1e-5)


def test_padding_is_not_attended_to():
    q, k = (torch.randn(1, 2, 5, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(2))
    place = torch.arange(5)
    mask = ((place <= place[:, None]) & (place >= 2)) | (place == place[:, None])
    found = own_weights(q, k, mask.view(1, 1, 5, 5))
    torch.testing.assert_close(found[:, 2:], own_weights(q[:, :, 2:], k[:, :, 2:]))


def test_rows_are_taken_in_parts(monkeypatch):
    q, k = (torch.randn(2, 2, 11, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(2))
    whole = own_weights(q, k)
    monkeypatch.setattr(module, "_ROWS", 3)
    torch.testing.assert_close(own_weights(q, k), whole, rtol=1e-6, atol=0)


def test_a_causal_mask_is_never_whole_in_memory(monkeypatch):
    first = torch.tensor([[0, 0, 0, 3, 3, 5, 5, 5, 6], [0, 1, 2, 3, 3, 3, 4, 5, 6]])
    mask = CausalMask(first)
    q, k = (torch.randn(2, 2, 9, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(2))
    whole = own_weights(q, k, mask.mask_B1QP)
    monkeypatch.setattr(module, "_ROWS", 4)
    monkeypatch.setattr(CausalMask, "mask_B1QP", None)
    torch.testing.assert_close(own_weights(q, k, CausalMask(first)), whole, rtol=1e-6, atol=0)


def test_uniform_attention_has_importance_one_at_every_position():
    q = torch.zeros(1, 3, 6, 4)
    torch.testing.assert_close(importance(own_weights(q, q), 3), torch.ones(1, 6))


@given(st.integers(0, 10**6), st.integers(0, 2), st.integers(2, 5), st.floats(0.1, 5))
def test_experts_are_proportional_to_importance(seed, low, high, slope):
    generator = torch.Generator().manual_seed(seed)
    probs = torch.randn(6, 5, generator=generator).softmax(dim=1)
    weights = 2 * torch.rand(6, generator=generator)
    found = experts_by_importance(probs, weights, torch.tensor(slope), low, high)
    for token, row in enumerate(probs.tolist()):
        product = torch.tensor(slope) * weights[token]
        count = min(max(round(product.item()), low), high)
        assert set(found[token].nonzero().flatten().tolist()) == oracles.top_k_choice(row, count)


def tokens(seed: int, length: int = 32) -> torch.Tensor:
    return torch.randint(VOCAB, (4, length), generator=torch.Generator().manual_seed(seed))


def test_the_decoder_gives_each_layer_the_importance_of_its_own_attention():
    model = Decoder(tiny_model("model.router.kind=da_moe"), VOCAB, seed=0)
    with torch.no_grad(), capture_plans(model.moe_layers) as plans:
        model(tokens(0))
    weights = [layer.attention.importance_BS for layer in model.layers]
    assert not torch.equal(*weights)
    for plan, own in zip(plans, weights, strict=True):
        assert torch.equal(plan.experts_per_token_T, (2.0 * own).round().clamp(1, 4).flatten().long())
    assert len(plans[0].experts_per_token_T.unique()) > 2


def test_the_choice_passes_no_gradient_to_attention():
    model = Decoder(tiny_model("model.router.kind=da_moe"), VOCAB, seed=0)
    model(tokens(0))
    assert not any(layer.attention.importance_BS.requires_grad for layer in model.layers)
    for recompute in ("selective", "full"):
        again = Decoder(tiny_model("model.router.kind=da_moe"), VOCAB, seed=0, recompute=recompute)
        losses = [run(tokens(0), tokens(1)) for run in (model, again)]
        gradients = [
            torch.autograd.grad(loss, run.w_embed_VD) for loss, run in zip(losses, (model, again), strict=True)
        ]
        assert torch.equal(gradients[0][0], gradients[1][0])


def test_a_budget_holds_the_mean_experts_per_token():
    config = tiny_config(*ATTENTIVE["da_moe limited"])
    model = Decoder(config.model, VOCAB, seed=0)
    train_steps(config, model.moe_layers, lambda step: model(tokens(step, 128)), 60)
    with torch.no_grad(), capture_plans(model.eval().moe_layers) as plans:
        for seed in range(100, 104):
            model(tokens(seed, 128))
    used = torch.cat([plan.experts_per_token_T for plan in plans]).float().mean().item()
    assert used == pytest.approx(1.5, rel=0.02)


def test_a_layer_without_attention_is_refused_in_one_line():
    layer = MoELayer(tiny_model("model.router.kind=da_moe"), 0, 0, MoEContext())
    with pytest.raises(ValueError, match=r"^importance_T=None: the da_moe router needs the attention .*; use a layer"):
        layer(torch.zeros(3, 16))


def test_an_export_is_refused_in_one_line(corpus_dir, tmp_path):
    run = begin(corpus_dir, tmp_path / "run", ATTENTIVE["da_moe"])
    with pytest.raises(UserError, match=r"^model\.router\.kind='da_moe': needs the attention weights, .*; run it with"):
        export(run.path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
