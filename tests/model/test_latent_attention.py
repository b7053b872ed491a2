"""Multi-head latent attention against transformers' DeepSeek-V3 and a softmax by hand, and its cache."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from dynmoe.model import Decoder
from dynmoe.model.attention import causal_attention
from dynmoe.model.cache import KeyValueCache
from dynmoe.model.documents import Documents
from dynmoe.model.latent_attention import LatentAttention
from dynmoe.model.rotary import rotary_tables
from tests.moe.cases import ATTENTIVE, LATENT, tiny_model

VOCAB = 48
CPU = torch.device("cpu")
YARN = [
    "model.rope_scaling.kind=yarn", "model.rope_scaling.factor=8", "model.rope_scaling.original_length=16",
    "model.rope_scaling.beta_fast=4", "model.rope_theta=500",
]  # fmt: skip
KINDS = {
    "queries from the input": LATENT[:-1],
    "queries from a latent": LATENT,
    "stretched positions": [*LATENT, "model.latent.qk_rope_head_dim=16", *YARN],
    "values as wide as keys": [*LATENT, "model.latent.v_head_dim=10"],
}


def tokens(length: int = 18, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (2, length), generator=torch.Generator().manual_seed(seed))


def theirs(ours: LatentAttention, model) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Attention of transformers with the same weights, and its rotary positions.

    DeepSeek rotates neighbouring rows together, so the rows of each rotated block are put into that order.
    """
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding

    latent = model.latent
    rope = {"rope_type": "default", "rope_theta": model.rope_theta}
    if (scaling := model.rope_scaling).kind is not None:
        rope |= {
            "rope_type": "yarn", "factor": scaling.factor, "beta_fast": scaling.beta_fast, "mscale": 1.0,
            "original_max_position_embeddings": scaling.original_length, "mscale_all_dim": 1.0,
        }  # fmt: skip
    config = DeepseekV3Config(
        hidden_size=model.hidden, num_attention_heads=model.heads, num_key_value_heads=model.heads,
        q_lora_rank=latent.q_lora_rank, kv_lora_rank=latent.kv_lora_rank, qk_nope_head_dim=latent.qk_nope_head_dim,
        qk_rope_head_dim=latent.qk_rope_head_dim, v_head_dim=latent.v_head_dim, rope_parameters=rope,
        max_position_embeddings=128, attn_implementation="eager",
    )  # fmt: skip
    attention = DeepseekV3Attention(config, 0).eval()
    for norm in (attention.q_a_layernorm, attention.kv_a_layernorm):
        if norm is not None:
            norm.variance_epsilon = model.norm_eps
    rotated = latent.qk_rope_head_dim

    def neighbours(rows: Tensor, blocks: int) -> Tensor:
        order = [i // 2 + i % 2 * (rotated // 2) for i in range(rotated)]
        parts = rows.unflatten(0, (blocks, -1))
        return torch.cat([parts[:, :-rotated], parts[:, -rotated:][:, order]], dim=1).flatten(0, 1)

    weights = {
        "kv_a_proj_with_mqa": neighbours(ours.w_kv_down, 1), "kv_a_layernorm": ours.kv_norm.weight,
        "kv_b_proj": ours.w_kv_up, "o_proj": ours.w_out,
    }  # fmt: skip
    if ours.q_norm is None:
        weights["q_proj"] = neighbours(ours.w_q, model.heads)
    else:
        weights |= {
            "q_a_proj": ours.w_q_down, "q_a_layernorm": ours.q_norm.weight,
            "q_b_proj": neighbours(ours.w_q_up, model.heads),
        }  # fmt: skip
    attention.load_state_dict({f"{name}.weight": weight for name, weight in weights.items()})
    return attention, DeepseekV3RotaryEmbedding(config)


@torch.no_grad()
def randomized(model) -> LatentAttention:
    """Attention with norms that are not 1 and scores that are not small."""
    attention = LatentAttention(model, 0, seed=0)
    generator = torch.Generator().manual_seed(1)
    for parameter in attention.parameters():
        if parameter.dim() == 1:
            parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
    return attention


@pytest.mark.parametrize("kind", KINDS)
def test_output_and_gradient_are_those_of_transformers(kind):
    model = tiny_model(*KINDS[kind])
    ours = randomized(model)
    other, rotary = theirs(ours, model)
    x = torch.randn(2, 40, model.hidden, generator=torch.Generator().manual_seed(2)) * 3
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    hidden = torch.full((40, 40), -torch.inf).triu(1)[None, None]
    found = ours(inputs[0], *rotary_tables(40, model, CPU))
    expected, weights = other(inputs[1], rotary(x, torch.arange(40)[None]), hidden)
    assert weights.amax(dim=-1).mean() > 0.3, "nearly uniform attention: the comparison is weak"
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    both = zip((found, expected), inputs, strict=True)
    gradients = [torch.autograd.grad(out.square().sum(), [own])[0] for out, own in both]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mask", ["all", "documents", "window"])
def test_narrow_values_give_the_attention_of_softmax(mask):
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 3, 9, 10, generator=generator, dtype=torch.float64) for _ in range(2))
    v = torch.randn(2, 3, 9, 4, generator=generator, dtype=torch.float64)
    starts = torch.tensor([[0] * 4 + [4] * 5, [0] * 9]) if mask == "documents" else None
    shown = Documents(starts, 9, CPU).mask(3 if mask == "window" else None)
    seen = torch.ones(9, 9, dtype=torch.bool).tril()[None, None] if shown is None else shown.mask_B1QP
    scores = (q @ k.transpose(2, 3) / math.sqrt(10)).masked_fill(~seen, -torch.inf)
    expected = scores.softmax(dim=-1) @ v
    torch.testing.assert_close(causal_attention(q, k, v, shown), expected)
    if shown is not None:  # the mask as a kernel on a GPU gets it
        torch.testing.assert_close(flex_attention(q, k, v, block_mask=shown.blocks), expected)


CACHED = {
    "stretched positions": KINDS["stretched positions"],
    "window": [*LATENT, "model.window=3", "model.full_attention_layers=[1]"],
    **{router: [*LATENT, *fields] for router, fields in ATTENTIVE.items()},
}


@pytest.mark.parametrize("kind", CACHED)
def test_cached_positions_of_padded_texts_give_the_logits_of_each_text_alone(kind):
    """Several tokens at once, and one token at a time, which takes another path."""
    model = Decoder(tiny_model(*CACHED[kind]), VOCAB, seed=0).eval()
    texts = [tokens(110, seed=1)[:1], tokens(100, seed=2)[:1]]
    batch = torch.cat([F.pad(text, (110 - text.shape[1], 0)) for text in texts])
    cache = KeyValueCache(2, torch.tensor([0, 10]))
    ends = [40, *range(41, 90), 100, 110]
    with torch.no_grad():
        found = [model.next_logits(batch[:, a:b], cache) for a, b in zip([0, *ends], ends, strict=False)]
        whole = [model(text)[0] for text in texts]
    for row, missing in enumerate((0, 10)):
        expected = torch.stack([whole[row][end - missing - 1] for end in ends])
        torch.testing.assert_close(torch.stack([own[row] for own in found]), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_absorbed_form_is_the_expanded_one(kind):
    """For the same queries and cache, in float64, so that only rounding differs; also the importance of a position."""
    model = tiny_model(*KINDS[kind], *ATTENTIVE["da_moe"])
    attention = randomized(model).double()
    generator = torch.Generator().manual_seed(3)
    rotated = model.latent.qk_rope_head_dim
    q_n, q_r, cached = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((2, 2, 1, 6), (2, 2, 1, rotated), (2, 1, 7, 12 + rotated))
    )
    outputs = []
    for form in (attention._absorbed, attention._expanded):
        outputs.append((form(q_n, q_r, cached, None), attention.importance_BS))
    torch.testing.assert_close(*outputs)


def test_the_cache_holds_latents_alone():
    model = tiny_model(*LATENT)
    cache = KeyValueCache(2, torch.zeros(2, dtype=torch.int64))
    Decoder(model, VOCAB, seed=0).next_logits(tokens(64), cache)
    (kept,) = cache.layers[0]._kept
    assert kept.shape[:2] == (2, 1)
    assert kept.shape[3] == model.latent.kv_lora_rank + model.latent.qk_rope_head_dim
