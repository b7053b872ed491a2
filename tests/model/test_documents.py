"""Documents that do not see each other: each is computed as if it were alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import flex_attention

from dynmoe.config.constants import IGNORED
from dynmoe.model import Decoder
from dynmoe.model.cross_entropy import linear_cross_entropy
from dynmoe.model.documents import Documents
from dynmoe.model.importance import own_weights
from dynmoe.moe.layer import capture_plans
from tests.moe.cases import ATTENTIVE, BASELINES, LATENT, ROUTERS, no_losses, tiny_model

VOCAB = 48
# Lengths of the documents of two sequences.
LENGTHS = [[5, 1, 9, 3], [2, 16]]
STARTS = torch.tensor([[0] * 5 + [5] + [6] * 9 + [15] * 3, [0] * 2 + [2] * 16])
KINDS = {
    **ROUTERS,
    **BASELINES,
    **ATTENTIVE,
    "top_p heads": [*ROUTERS["top_p"], "model.qk_norm=head"],
    "top_p latent": [*ROUTERS["top_p"], *LATENT],
    "da_moe latent": [*ATTENTIVE["da_moe"], *LATENT],
    "top_p window": [*ROUTERS["top_p"], "model.window=3", "model.full_attention_layers=[1]"],
}


def tokens(seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCAB, (2, 18), generator=torch.Generator().manual_seed(seed))


def decoder(kind: str, recompute: str = "none") -> Decoder:
    model = Decoder(tiny_model(*KINDS[kind], *no_losses(kind.partition(" ")[0])), VOCAB, seed=0, recompute=recompute)
    model.context.aim(1.5)
    return model


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_document_has_the_logits_of_the_document_alone(kind):
    model = decoder(kind).eval()
    with torch.no_grad():
        packed = model(tokens(), start_BS=STARTS)
        joined = model(tokens())
        for row, lengths in enumerate(LENGTHS):
            texts = tokens()[row].split(lengths)
            for text, found in zip(texts, packed[row].split(lengths), strict=True):
                torch.testing.assert_close(found, model(text[None])[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(packed[:, 8:], joined[:, 8:], atol=1e-3), "documents make no difference"


def influence(kind: str, recompute: str, start_BS: torch.Tensor | None, seed: int) -> set[str]:
    """What of the third document of the first sequence changes with all other documents: logits, gradients, routing."""
    own = (0, slice(6, 15))
    found = []
    others = tokens(seed)
    others[own] = tokens()[own]
    for text in (tokens(), others):
        model = decoder(kind, recompute)
        embedded = F.embedding(text, model.w_embed_VD.detach()).requires_grad_()
        model.w_embed_VD.requires_grad_(False)
        with capture_plans(model.moe_layers) as plans:
            documents = Documents(start_BS, 18, text.device)
            hidden_BSD = model.hidden(text[:, :0], prefix_BPD=embedded, documents=documents)
            logits_BSV = F.linear(hidden_BSD, model.output_weight_VD)
            loss = F.cross_entropy(logits_BSV.transpose(1, 2), tokens(seed=2), reduction="sum")
            routing = [torch.cat([plan.routing_map_TE, plan.gates_TE], dim=1).unflatten(0, (2, 18)) for plan in plans]
        (gradient,) = torch.autograd.grad(loss, [embedded])
        found.append(
            {
                "logits": logits_BSV[own],
                "gradient": gradient[own],
                "routing": torch.stack([r[own] for r in routing[:2]]),
            }
        )
    return {name for name, first in found[0].items() if not torch.allclose(first, found[1][name], rtol=1e-5, atol=1e-7)}


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_document_changes_nothing_of_another_unless_its_router_selects_among_tokens(kind, recompute):
    selects = decoder(kind).moe_layers[0].router.spec.selects_among
    leaks = set[str]().union(*(influence(kind, recompute, STARTS, seed) for seed in (1, 2, 3)))
    assert bool(leaks) == (selects != "token"), leaks
    assert influence(kind, recompute, None, 1) == {"logits", "gradient", "routing"}, "without the mask"


def test_positions_begin_at_0_in_each_document():
    places = Documents(STARTS, 18, torch.device("cpu")).place_BS
    assert places.tolist() == [[place for length in own for place in range(length)] for own in LENGTHS]


def random_starts(length: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    begins = torch.rand(3, length, generator=generator) < torch.tensor([[0.5], [0.02], [0.0]])
    return torch.where(begins, torch.arange(length), 0).cummax(dim=1).values


@pytest.mark.parametrize("window", [None, 1, 200])
@pytest.mark.parametrize("length", [1, 127, 128, 129, 700])
def test_masks_and_blocks_show_the_same_pairs(length, window):
    """FlexAttention with the blocks is attention with the mask, which is counted here pair by pair."""
    starts = random_starts(length, seed=length)
    mask = Documents(starts, length, torch.device("cpu")).mask(window)
    shown = [
        [max(start, query - (window or length) + 1) <= key <= query for key in range(length)]
        for query, start in enumerate(starts[0])
    ]
    assert torch.equal(mask.mask_B1QP[0, 0], torch.tensor(shown))
    size = 128
    count = -(-length // size)
    padded = F.pad(mask.mask_B1QP, (0, count * size - length, 0, count * size - length))
    seen = padded.unflatten(3, (count, size)).unflatten(2, (count, size)).any(dim=(3, 5))
    assert torch.equal(mask.blocks.to_dense().bool(), seen), "blocks that are computed and blocks with a pair differ"
    q, k, v = torch.randn(3, 3, 4, length, 16).unbind()
    found = flex_attention(q, k[:, :2], v[:, :2], block_mask=mask.blocks, enable_gqa=True)
    expected = F.scaled_dot_product_attention(q, k[:, :2], v[:, :2], mask.mask_B1QP, enable_gqa=True)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(own_weights(q, k, mask), own_weights(q, k, mask.mask_B1QP))


def test_a_window_without_documents_is_the_same_for_all_sequences():
    alone = Documents(None, 300, torch.device("cpu"))
    assert alone.mask(None) is None
    assert alone.mask(300) is None
    mask = alone.mask(40)
    assert mask is alone.mask(40)
    assert mask.mask_B1QP.shape == (1, 1, 300, 300)
    whole = Documents(torch.zeros(2, 300, dtype=torch.int64), 300, torch.device("cpu")).mask(40)
    assert torch.equal(mask.mask_B1QP.expand(2, 1, 300, 300), whole.mask_B1QP)
    q = torch.randn(2, 2, 300, 16)
    found = flex_attention(q, q, q, block_mask=mask.blocks)
    torch.testing.assert_close(found, F.scaled_dot_product_attention(q, q, q, mask.mask_B1QP), rtol=1e-5, atol=1e-6)


def test_a_token_beyond_the_windows_of_all_layers_changes_nothing():
    model = Decoder(tiny_model(*ROUTERS["top_p"], "model.window=4"), VOCAB, seed=0).eval()
    other = tokens().clone()
    other[:, 2] = (other[:, 2] + 1) % VOCAB
    with torch.no_grad():
        difference = (model(tokens()) - model(other)).abs().amax(dim=(0, 2))
        full = tiny_model(*ROUTERS["top_p"], "model.window=4", "model.full_attention_layers=[1]")
        mixed = Decoder(full, VOCAB, seed=0).eval()
        seen = (mixed(tokens()) - mixed(other)).abs().amax(dim=(0, 2))
    reach = 2 * (4 - 1)  # of two layers
    assert (difference[2 : 2 + reach + 1] > 0).all()
    assert (difference[2 + reach + 1 :] == 0).all()
    assert (seen[2:] > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ignored_labels_have_no_part_in_the_loss(dtype):
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(20, 8, generator=generator).to(dtype).requires_grad_()
    w = torch.randn(VOCAB, 8, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(VOCAB, (20,), generator=generator)
    labels[[0, 7, 19]] = IGNORED
    for total, divisor in ((None, 17.0), (torch.tensor(5.0), 5.0)):
        found = linear_cross_entropy(h, w, labels, total)
        expected = F.cross_entropy(F.linear(h, w).float(), labels, ignore_index=IGNORED, reduction="sum") / divisor
        torch.testing.assert_close(found, expected)
        for ours, theirs in zip(torch.autograd.grad(found, [h, w]), torch.autograd.grad(expected, [h, w]), strict=True):
            torch.testing.assert_close(ours, theirs)
    nothing = linear_cross_entropy(h, w, torch.full_like(labels, IGNORED))
    assert nothing.item() == 0
