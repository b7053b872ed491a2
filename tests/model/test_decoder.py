from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from dynmoe.config import load_config
from dynmoe.config.constants import CHUNK_LOGITS
from dynmoe.errors import ConfigError
from dynmoe.model import Decoder, ModelSize
from dynmoe.model.cache import KeyValueCache
from dynmoe.model.cross_entropy import linear_cross_entropy
from dynmoe.model.sampling import Sampling, pad_left, sample, whole_context, with_cache
from dynmoe.moe import StepState
from tests.moe.cases import BASELINES, LATENT, LONGCAT, ROUTERS, tiny_model

VOCAB = 48


def tokens(batch: int = 2, length: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def test_attention_is_causal():
    model = Decoder(tiny_model(), VOCAB, seed=0)
    first = tokens()
    second = first.clone()
    second[:, 7] = (second[:, 7] + 1) % VOCAB
    before = model(first)
    after = model(second)
    torch.testing.assert_close(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7:], after[:, 7:])


def test_rotary_scores_depend_on_relative_positions():
    """RoPE: attention scores depend only on distances."""
    from dynmoe.model.rotary import rotary_tables, rotate

    cos, sin = rotary_tables(10, tiny_model(), torch.device("cpu"))
    q, k = (torch.randn(1, 1, 1, 8).expand(1, 1, 10, 8) for _ in range(2))
    scores = (rotate(q, cos, sin) @ rotate(k, cos, sin).transpose(-1, -2))[0, 0]
    torch.testing.assert_close(scores[:-1, :-1], scores[1:, 1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", ["head", "projection"])
def test_qk_norm_makes_attention_independent_of_the_projection_scale(norm):
    """RMSNorm of each head, or of all heads together, removes the common scale."""
    overrides = [
        f"model.qk_norm={norm}",
        "model.heads=4",
        "model.kv_heads=2",
        "model.head_dim=6",
        "model.norm_eps=1e-9",
    ]
    model = Decoder(tiny_model(*overrides), VOCAB, seed=0)
    before = model(tokens())
    projection = model.layers[0].attention.w_qkv
    second_query_head = slice(6, 12)
    with torch.no_grad():
        projection[:36] *= 3.0  # queries and keys, of all heads
        torch.testing.assert_close(model(tokens()), before, rtol=1e-4, atol=1e-5)
        projection[second_query_head] *= 3.0
        same = torch.allclose(model(tokens()), before, rtol=1e-4, atol=1e-5)
    assert same == (norm == "head")


CACHED = {
    **ROUTERS, **BASELINES, "heads": ["model.qk_norm=head"], "projections": ["model.qk_norm=projection"],
    "window": ["model.window=3", "model.full_attention_layers=[1]"], "latent": LATENT, "longcat": LONGCAT,
}  # fmt: skip


@pytest.mark.parametrize("kind", sorted(CACHED))
def test_cached_positions_of_padded_texts_give_the_logits_of_each_text_alone(kind):
    # In fp64, as kernels for other sizes round differently.
    model = Decoder(tiny_model(*CACHED[kind]), VOCAB, seed=0).eval().double()
    texts = [tokens(1, 9, seed=1), tokens(1, 5, seed=2)]
    padding = [9 - text.shape[1] for text in texts]
    batch = torch.cat([F.pad(text, (missing, 0)) for text, missing in zip(texts, padding, strict=True)])
    cache = KeyValueCache(2, torch.tensor(padding))
    with torch.no_grad():
        parts = [model.next_logits(part, cache) for part in (batch[:, :6], batch[:, 6:7], batch[:, 7:])]
        whole = [model(text)[0] for text in texts]
    for end, logits in zip((6, 7, 9), parts, strict=True):
        for own, text, missing in zip(logits, whole, padding, strict=True):
            torch.testing.assert_close(own, text[end - missing - 1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("window", [None, 30])
@pytest.mark.parametrize("padding", [[0, 0], [0, 7]])
def test_a_cache_grows_with_the_text(padding, window):
    """One token at a time, and several at once, past the room that the cache has at first."""
    fields = [] if window is None else [f"model.window={window}", "model.full_attention_layers=[0]"]
    model = Decoder(tiny_model(*CACHED["top_p"], *fields), VOCAB, seed=0).eval()
    texts = [tokens(1, 150 - missing, seed=missing) for missing in padding]
    batch = torch.cat([F.pad(text, (missing, 0)) for text, missing in zip(texts, padding, strict=True)])
    cache = KeyValueCache(2, torch.tensor(padding))
    ends = [50, *range(51, 120), 140, 150]
    with torch.no_grad():
        found = [model.next_logits(batch[:, a:b], cache) for a, b in zip([0, *ends], ends, strict=False)]
        whole = [model(text)[0] for text in texts]
    for row, missing in enumerate(padding):
        expected = torch.stack([whole[row][end - missing - 1] for end in ends])
        torch.testing.assert_close(torch.stack([own[row] for own in found]), expected, rtol=1e-4, atol=1e-5)


def test_embeddings_take_the_positions_before_the_tokens():
    """Embeddings of tokens as a prefix are those tokens, with and without a cache; their gradient arrives."""
    model = Decoder(tiny_model(*ROUTERS["top_any"]), VOCAB, seed=0).eval()
    text = tokens()
    prefix = F.embedding(text[:, :5], model.w_embed_VD.detach()).requires_grad_()
    whole = model.hidden(text)
    torch.testing.assert_close(model.hidden(text[:, 5:], prefix_BPD=prefix), whole)
    cache = KeyValueCache(2, torch.zeros(2, dtype=torch.int64))
    first = model.hidden(text[:, 5:8], cache, prefix)
    torch.testing.assert_close(torch.cat([first, model.hidden(text[:, 8:], cache)], dim=1), whole)
    model.hidden(text[:, 5:], prefix_BPD=prefix)[:, -1].sum().backward()
    assert prefix.grad is not None
    assert (prefix.grad.abs().sum(dim=2) > 0).all()


@pytest.mark.parametrize("kind", [*sorted(ROUTERS), "quantile", "latent", "longcat"])
def test_recomputation_gives_equal_gradients_and_counts_routes_once(kind):
    results = []
    for recompute in ("none", "selective", "full"):
        model = Decoder(tiny_model(*CACHED[kind]), VOCAB, seed=0, recompute=recompute)
        model.context.step = StepState(recording=True, target_experts=2.0)
        loss = model(tokens(), tokens(seed=1))
        loss.backward()
        counted = [layer.drain() for layer in model.moe_layers]
        statistics = torch.stack([own.statistics() for own in counted])
        rows = [own.routed_rows for own in counted]
        results.append((loss.item(), [p.grad for p in model.parameters()], statistics, rows))
    loss, gradients, statistics, rows = results[0]
    assert statistics[0, 0] == 1  # one forward pass
    for again, regained, restated, recounted in results[1:]:
        assert loss == again
        assert all(torch.equal(a, b) for a, b in zip(gradients, regained, strict=True))
        assert torch.equal(statistics, restated)
        assert rows == recounted


@pytest.mark.parametrize("chunk_logits", [1, 100, 1 << 20])
def test_chunked_cross_entropy_equals_pytorchs(monkeypatch, chunk_logits):
    monkeypatch.setitem(CHUNK_LOGITS, "cpu", chunk_logits)
    hidden = torch.randn(7, 8)
    weight = torch.randn(VOCAB, 8)
    labels = tokens(1, 7).flatten()
    results = []
    for compute in (linear_cross_entropy, lambda h, w, y: F.cross_entropy(h @ w.t(), y)):
        h, w = (tensor.clone().requires_grad_() for tensor in (hidden, weight))
        loss = compute(h, w, labels)
        (3.0 * loss).backward()
        results.append((loss.detach(), h.grad, w.grad))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)


def test_loss_equals_the_cross_entropy_of_the_logits_when_embeddings_are_tied():
    model = Decoder(tiny_model("model.tie_embeddings=true"), VOCAB, seed=0)
    expected = F.cross_entropy(model(tokens()).flatten(0, 1), tokens(seed=1).flatten())
    torch.testing.assert_close(model(tokens(), tokens(seed=1)), expected)
    model(tokens(), tokens(seed=1)).backward()
    assert model.w_embed_VD.grad.abs().sum() > 0
    assert "w_out_VD" not in dict(model.named_parameters())


def test_moe_in_every_second_layer():
    model = Decoder(tiny_model("model.layers=4", "model.moe.moe_layer_freq=2"), VOCAB, seed=0)
    assert [layer.moe is not None for layer in model.layers] == [True, False, True, False]
    assert [layer.layer for layer in model.moe_layers] == [0, 2]


@pytest.mark.parametrize("freq", [2, 3])
def test_a_shortcut_adds_the_output_of_experts_behind_the_next_layer(freq):
    fields = [f"model.layers={2 * freq}", f"model.moe.moe_layer_freq={freq}", "model.moe.shortcut=true"]
    model = Decoder(tiny_model(*fields), VOCAB, seed=0).double()
    x = F.embedding(tokens(), model.w_embed_VD)
    tables = model._tables(12)
    branches = {}
    for number, layer in enumerate(model.layers):
        assert (layer.moe is not None) == (number % freq == 0)
        x = x + layer.attention(layer.attention_norm(x), *tables)
        normed = layer.ffn_norm(x)
        branches[number] = 0 if layer.moe is None else layer.moe(normed)
        x = x + layer.ffn(normed) + branches.get(number - 1, 0)
    torch.testing.assert_close(model.hidden(tokens()), model.norm(x))


def test_the_first_layers_are_dense():
    fields = ["model.layers=7", "model.moe.first_k_dense_replace=3", "model.moe.moe_layer_freq=2"]
    model = Decoder(tiny_model(*fields, "model.moe.experts_by_layer=[2,3]", "model.moe.experts=3"), VOCAB, seed=0)
    assert [layer.moe is not None for layer in model.layers] == [False, False, False, False, True, False, True]
    assert [layer.num_experts for layer in model.moe_layers] == [2, 3]
    with pytest.raises(ConfigError, match=r"^model.moe.first_k_dense_replace=2: leaves no MoE layer of 2; use fewer$"):
        tiny_model("model.moe.first_k_dense_replace=2")


def test_a_dense_model_has_no_moe_layer():
    model = Decoder(tiny_model("model.moe.experts=0"), VOCAB, seed=0)
    assert model.moe_layers == []
    model(tokens(), tokens(seed=1)).backward()


def test_initial_weights_depend_on_seed_and_name_only():
    first, again = (Decoder(tiny_model(), VOCAB, seed=5) for _ in range(2))
    other = Decoder(tiny_model(), VOCAB, seed=6)
    deeper = Decoder(tiny_model("model.moe.moe_layer_freq=2"), VOCAB, seed=5)
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, dict(again.named_parameters())[name])
        if parameter.dim() > 1:
            assert not torch.equal(parameter, dict(other.named_parameters())[name])
    assert torch.equal(first.layers[1].attention.w_qkv, deeper.layers[1].attention.w_qkv)


@pytest.mark.parametrize(
    "overrides",
    [
        [], ["model.router.kind=top_any"], ["model.tie_embeddings=true", "model.moe.moe_layer_freq=2"],
        ["model.moe.shared_hidden=8"], ["model.moe.shared_hidden=8", "model.moe.shared_gate=true"],
        ["model.moe.first_k_dense_replace=1", "model.moe.experts_by_layer=[4]"],
        ["model.moe.experts=0"], ["model.qk_norm=head", "model.head_dim=4"],
        ["model.qk_norm=projection", "model.heads=4", "model.head_dim=6", "model.kv_heads=2"],
        ["model.attention_bias=qkv"], ["model.attention_bias=all", "model.moe.experts=0"],
        LATENT, [*LATENT[:-1], "model.moe.experts=0"], LONGCAT,
    ],
)  # fmt: skip
def test_parameter_count_equals_that_of_the_model(overrides):
    settings = tiny_model(*overrides)
    size = ModelSize(settings, VOCAB, 12)
    model = Decoder(settings, VOCAB, seed=0)
    assert size.total_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert size.active_parameters(settings.moe.experts) == size.total_parameters


@pytest.mark.parametrize("attention", [[], LATENT, LATENT[:-1]], ids=["heads", "latent", "latent of keys alone"])
def test_flops_equal_those_counted_by_torch(attention):
    from torch.utils.flop_counter import FlopCounterMode

    settings = tiny_model("model.moe.experts=0", "model.ffn_hidden=24", *attention)
    model = Decoder(settings, VOCAB, seed=0)
    batch = 2
    length = 12
    counter = FlopCounterMode(display=False)
    with counter:
        model(tokens(batch, length))
    counts = counter.get_flop_counts()["Global"]
    products = sum(value for op, value in counts.items() if "attention" not in str(op) and "bmm" not in str(op))
    size = ModelSize(settings, VOCAB, length)
    pairs = length * length // 2  # each head multiplies a query and a key, and a weight and a value
    width = settings.hidden if not attention else 2 * ((6 + 4) + 8) // 2
    attention = 6 * batch * settings.layers * pairs * 2 * width
    # Forward products are a third of training; attention scores are counted apart (torch counts them in full).
    assert products == (size.flops(batch * length, 0) - attention) // 3
    assert ModelSize(tiny_model(), VOCAB, 12).flops(0, 10) == 10 * 6 * 3 * 16 * 24
    assert ModelSize(tiny_model(), VOCAB, 12).static_flops(5, 2.0) == ModelSize(tiny_model(), VOCAB, 12).flops(5, 20)


def test_embedding_rows_are_padded_or_configured():
    assert tiny_model().embedding_rows(4096) == 4096
    assert tiny_model().embedding_rows(4097) == 4160
    assert tiny_model("model.vocab_size=128").embedding_rows(100) == 128
    with pytest.raises(ConfigError, match=r"model\.vocab_size=64"):
        tiny_model("model.vocab_size=64").embedding_rows(100)


def test_sampling_is_repeatable_and_stays_in_the_vocabulary():
    model = Decoder(tiny_model(), VOCAB, seed=0).eval()
    prompt = torch.tensor([[1, 2]])
    drawn = [
        [int(token) for token in sample(whole_context(model, 8), prompt, 20, vocab_size=40, seed=seed)]
        for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(drawn[0]) == 20
    assert max(drawn[0]) < 40


def test_cached_sampling_of_a_batch_equals_sampling_each_text_alone():
    model = Decoder(tiny_model(), VOCAB, seed=0).eval()
    prompts = [[1, 2, 3, 4, 5], [7, 8]]
    greedy = Sampling(temperature=0)
    batch, padding = pad_left(prompts, 0)
    assert batch.tolist() == [[1, 2, 3, 4, 5], [0, 0, 0, 7, 8]]
    together = torch.stack(list(sample(with_cache(model, padding), batch, 6, vocab_size=VOCAB, sampling=greedy)), dim=1)
    for own, prompt in zip(together, prompts, strict=True):
        alone = sample(whole_context(model, 100), torch.tensor([prompt]), 6, vocab_size=VOCAB, sampling=greedy)
        assert own.tolist() == [int(token) for token in alone]


@pytest.mark.parametrize(
    ("sampling", "allowed"),
    [
        (Sampling(temperature=1, top_k=2), {1, 3}),
        (Sampling(temperature=1, top_k=0, top_p=0.55), {1, 3}),
        (Sampling(temperature=1, top_k=0, top_p=0.45), {1}),
        (Sampling(temperature=1, top_k=0, top_p=1e-9), {1}),
        (Sampling(temperature=1, top_k=0), {0, 1, 2, 3}),
        (Sampling(temperature=0), {1}),
    ],
)
def test_only_allowed_tokens_are_sampled(sampling, allowed):
    logits = torch.tensor([0.1, 0.5, 0.1, 0.3]).log().expand(400, 4)
    drawn = sampling.draw(logits, torch.Generator().manual_seed(0))
    assert set(drawn.tolist()) == allowed
    if len(allowed) == 4:
        assert (drawn == 1).float().mean() == pytest.approx(0.5, abs=0.1)


def test_initial_loss_is_that_of_a_uniform_guess():
    config = load_config(None, ["model.hidden=64", "model.moe.experts=4"])
    model = Decoder(config.model, 512, seed=0)
    generator = torch.Generator().manual_seed(0)
    batch = torch.randint(512, (2, 65), generator=generator)
    assert model(batch[:, :-1], batch[:, 1:]).item() == pytest.approx(math.log(512), rel=0.02)
