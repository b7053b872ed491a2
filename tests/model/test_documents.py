"""Documents that do not see each other: each is computed as if it were alone."""

from __future__ import annotations

from collections.abc import Sequence

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


OWN = (0, slice(6, 15))  # the third document of the first sequence


def own_parts(kind: str, recompute: str, start_BS: torch.Tensor | None, text: torch.Tensor) -> dict[str, torch.Tensor]:
    """Logits, gradients and routing of the third document of the first sequence."""
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
    own_routing = torch.stack([layer[OWN] for layer in routing[:2]])  # without those of recomputation
    return {"logits": logits_BSV[OWN], "gradient": gradient[OWN], "routing": own_routing}


def influence(kind: str, recompute: str, start_BS: torch.Tensor | None, seeds: Sequence[int]) -> set[str]:
    """What of the third document changes with all other documents: logits, gradients, routing."""
    first = own_parts(kind, recompute, start_BS, tokens())
    changed = set()
    for seed in seeds:
        text = tokens(seed)
        text[OWN] = tokens()[OWN]
        other = own_parts(kind, recompute, start_BS, text)
        changed |= {name for name in first if not torch.allclose(first[name], other[name], rtol=1e-5, atol=1e-7)}
    return changed


# Selective recomputation repeats attention alone, which is the same with most routers.
ATTENTIONS = ["da_moe", "da_moe latent", "top_p", "top_p heads", "top_p latent", "top_p window"]
REPEATED = [(kind, recompute) for recompute in ("none", "full") for kind in sorted(KINDS)]
REPEATED += [(kind, "selective") for kind in ATTENTIONS]


@pytest.mark.parametrize(("kind", "recompute"), REPEATED)
def test_a_document_changes_nothing_of_another_unless_its_router_selects_among_tokens(kind, recompute):
    selects = decoder(kind).moe_layers[0].router.spec.selects_among
    leaks = influence(kind, recompute, STARTS, (1, 2, 3))
    assert bool(leaks) == (selects != "token"), leaks
    assert influence(kind, recompute, None, (1,)) == {"logits", "gradient", "routing"}, "without the mask"


def test_positions_begin_at_0_in_each_document():
    places = Documents(STARTS, 18, torch.device("cpu")).place_BS
    assert places.tolist() == [[place for length in own for place in range(length)] for own in LENGTHS]


def random_starts(length: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    begins = torch.rand(3, length, generator=generator) < torch.tensor([[0.5], [0.02], [0.0]])
    return torch.where(begins, torch.arange(length), 0).cummax(dim=1).values


def in_blocks(mask_B1QP: torch.Tensor, of_no_query: bool) -> torch.Tensor:
    """A mask in blocks of 128 queries and keys, [B, 1, I, 128, J, 128]; no position attends to a key that is not there.

    Args:
        of_no_query: what rows without a query have.
    """
    rest = -mask_B1QP.shape[3] % 128
    padded = F.pad(F.pad(mask_B1QP, (0, rest)), (0, 0, 0, rest), value=of_no_query)
    return padded.unflatten(3, (-1, 128)).unflatten(2, (-1, 128))


@pytest.mark.parametrize("window", [None, 1, 200])
@pytest.mark.parametrize("length", [1, 127, 128, 129, 400])
def test_masks_and_blocks_show_the_same_pairs(length, window):
    """The mask is counted pair by pair. FlexAttention's kernel skips blocks, and masks no pair of whole ones.

    Without a kernel, as here, it masks every pair and ignores the blocks, which are therefore counted too.
    """
    starts = random_starts(length, seed=length)
    mask = Documents(starts, length, torch.device("cpu")).mask(window)
    shown = [
        [max(start, query - (window or length) + 1) <= key <= query for key in range(length)]
        for query, start in enumerate(starts[0])
    ]
    assert torch.equal(mask.mask_B1QP[0, 0], torch.tensor(shown))
    seen = in_blocks(mask.mask_B1QP, False).any(dim=(3, 5))
    assert torch.equal(mask.blocks.to_dense().bool(), seen), "blocks that are computed and blocks with a pair differ"
    whole = in_blocks(mask.mask_B1QP, True).all(dim=(3, 5))
    number, order = mask.blocks.full_kv_num_blocks, mask.blocks.full_kv_indices
    listed = (torch.arange(order.shape[3]) < number.unsqueeze(3)).int()
    found = torch.zeros_like(order).scatter(3, order.long(), listed)
    assert torch.equal(found.bool(), whole), "blocks without a mask and blocks with all pairs differ"
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
