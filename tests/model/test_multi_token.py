"""Layers that predict further tokens, against loops over positions (arXiv 2412.19437, equations 21 to 25)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dynmoe.config import load_config
from dynmoe.config.constants import IGNORED
from dynmoe.data.batches import Batch
from dynmoe.errors import ConfigError
from dynmoe.model import Decoder, ModelSize
from dynmoe.model.decoder import DecoderLayer
from dynmoe.model.documents import Documents
from dynmoe.moe.layer import capture_plans
from tests.moe.cases import BASELINES, LATENT, ROUTERS, tiny_model

VOCAB = 48
LENGTH = 12
TWO = ["model.mtp.layers=2", "model.mtp.loss_weight=0.7"]
# Routers without losses, whose counts would include the tokens that the loops leave out.
PLAIN = ["model.router.balance_loss=0", "model.router.kind=top_k", "model.router.k=2"]
MODELS = {
    "experts": PLAIN,
    "dense": ["model.moe.experts=0"],
    "dense behind": [*PLAIN, "model.layers=3", "model.moe.moe_layer_freq=3"],  # layers 3 and 4: experts, dense
    "tied": [*PLAIN, "model.tie_embeddings=true"],
    "latent, windows": [*PLAIN, *LATENT, "model.window=4", "model.full_attention_layers=[2]"],
}


def decoder(*overrides: str, recompute: str = "none") -> Decoder:
    model = Decoder(tiny_model(*overrides), VOCAB, seed=0, recompute=recompute)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("norm.weight"):  # no norm is the identity
                weight.copy_(0.5 + torch.rand(weight.shape, generator=generator))
    return model.double()


def batch(lengths: tuple[int, ...] = ()) -> Batch:
    """Two sequences, of documents of these lengths."""
    text = torch.randint(VOCAB, (2, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    start = None
    if lengths:
        place = [first for index, length in enumerate(lengths) for first in [sum(lengths[:index])] * length]
        start = torch.tensor([place, place])
    return Batch(text[:, :-1], text[:, 1:], start)


def ahead(made: Batch, depths: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(own.tokens_BS, own.labels_BS) for own in made.looking_ahead(depths).ahead]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


def looped(model: Decoder, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean over depths of the mean cross-entropy, of sequences that end where no token is so far ahead."""
    settings = model.settings
    hidden = model.hidden(tokens)
    losses = []
    for depth in (1, 2):
        layer = model.layers[settings.layers + depth - 1]
        length = LENGTH - depth
        join = layer.join
        inputs = []
        for row in range(2):
            for i in range(length):
                embedding = rms_norm(model.w_embed_VD[tokens[row, i + depth]], join.embedding_norm.weight, 1e-5)
                before = rms_norm(hidden[row, i], join.hidden_norm.weight, 1e-5)
                inputs.append(join.w_join[:, :16] @ embedding + join.w_join[:, 16:] @ before)
        x = torch.stack(inputs).view(2, length, 16)
        places = model._places(Documents(None, length, x.device), length)
        x, _ = DecoderLayer.forward(layer, x, *places)
        hidden = rms_norm(x, layer.norm.weight, 1e-5)
        logits = hidden @ model.output_weight_VD.T
        losses.append(
            torch.stack([
                F.cross_entropy(logits[row, i], labels[row, i + depth]) for row in range(2) for i in range(length)
            ]).mean()
        )  # fmt: skip
    return torch.stack(losses).mean()


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_a_loop(name, recompute):
    model = decoder(*MODELS[name], *TWO, recompute=recompute)
    made = batch()
    alone = model(made.tokens_BS, made.labels_BS)
    expected = looped(model, made.tokens_BS, made.labels_BS)
    parameters = dict(model.named_parameters())
    wanted = torch.autograd.grad(alone + 0.7 * expected, list(parameters.values()), allow_unused=True)
    loss = model(made.tokens_BS, made.labels_BS, ahead=ahead(made, 2))
    loss.backward()
    torch.testing.assert_close(loss, alone, rtol=0, atol=0)
    torch.testing.assert_close(model.loss_ahead.double(), expected, rtol=1e-6, atol=0)  # the loss itself is fp32
    for (weight, parameter), gradient in zip(parameters.items(), wanted, strict=True):
        assert gradient.abs().max() > 0, weight
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6, msg=weight)


def test_the_layers_are_part_of_training_alone():
    model = decoder(*PLAIN, *TWO)
    made = batch()
    with capture_plans(model.moe_layers) as plans:
        logits = model(made.tokens_BS)
        assert len(plans) == 2
        model(made.tokens_BS, made.labels_BS, ahead=ahead(made, 2))
        assert len(plans) == 2 + 4
    without = Decoder(model.settings.without_mtp(), VOCAB, seed=0).double()
    without.load_state_dict({name: value for name, value in model.state_dict().items() if name in without.state_dict()})
    torch.testing.assert_close(without(made.tokens_BS), logits, rtol=0, atol=0)


def test_a_batch_looks_ahead_within_sequence_and_document():
    made = Batch(
        torch.tensor([[5, 6, 7, 8, 9]]), torch.tensor([[6, 7, IGNORED, 9, 4]]), torch.tensor([[0, 0, 0, 3, 3]])
    )
    first, second = made.looking_ahead(2).ahead
    assert first.tokens_BS.tolist() == [[6, 7, 0, 9, 0]]
    assert first.labels_BS.tolist() == [[7, IGNORED, IGNORED, 4, IGNORED]]
    assert second.tokens_BS.tolist() == [[7, 0, 0, 0, 0]]
    assert second.labels_BS.tolist() == [[IGNORED] * 5]


def test_every_layer_needs_a_batch():
    model = decoder(*PLAIN, *TWO)
    made = batch()
    with pytest.raises(ValueError, match="shorter"):
        model(made.tokens_BS, made.labels_BS, ahead=ahead(made, 1))


def test_documents_are_predicted_as_if_they_were_alone():
    model = decoder(*PLAIN, "model.mtp.layers=2")
    lengths = (4, 1, 7)
    made = batch(lengths)
    model(made.tokens_BS, made.labels_BS, made.start_BS, ahead=ahead(made, 2))
    sums = torch.zeros(2, dtype=torch.float64)
    counts = torch.zeros(2)
    start = 0
    for length in lengths:
        own = made.at(torch.arange(start, start + length))
        alone = Batch(own.tokens_BS, own.labels_BS)
        start += length
        for depth in (1, 2):
            if length <= depth:
                continue
            count = 2 * (length - depth)
            # A total of 1 for this depth; of the other, no label counts.
            moved = [
                (tokens, labels if k == depth else torch.full_like(labels, IGNORED))
                for k, (tokens, labels) in enumerate(ahead(alone, 2), start=1)
            ]
            model(alone.tokens_BS, alone.labels_BS, total_tokens=torch.ones(3), ahead=moved)
            sums[depth - 1] += 2 * model.loss_ahead.double()  # the mean of both depths
            counts[depth - 1] += count
    model(made.tokens_BS, made.labels_BS, made.start_BS, ahead=ahead(made, 2))
    torch.testing.assert_close(model.loss_ahead.double(), (sums / counts).mean(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", [*ROUTERS, "seq_top_k"])
def test_size_counts_the_layers(kind):
    router = {**ROUTERS, **BASELINES}[kind]
    model = tiny_model(*router, "model.layers=3", *TWO)
    whole = Decoder(model, VOCAB, seed=0)
    size = ModelSize(model, VOCAB, LENGTH)
    assert size.total_parameters == sum(p.numel() for p in whole.parameters())
    without = ModelSize(model.without_mtp(), VOCAB, LENGTH)
    assert size.active_parameters(2.0) == without.active_parameters(2.0)
    # Two more layers, each with a projection from 2 D to D and the output projection.
    deeper = ModelSize(tiny_model(*router, "model.layers=5"), VOCAB, LENGTH)
    assert size.flops(10, 7) - deeper.flops(10, 7) == 6 * 10 * 2 * (2 * 16 * 16 + VOCAB * 16)


def test_the_model_outside_of_training_has_the_fields_of_its_layers():
    fields = ["model.layers=3", "model.window=4", "model.full_attention_layers=[1,4]", "model.mtp.layers=2"]
    model = tiny_model(*fields, "model.moe.experts_by_layer=[2,3,4,3,2]", "model.moe.experts=4")
    assert model.moe_layers == [0, 1, 2, 3, 4]
    without = model.without_mtp()
    assert (without.moe.experts_by_layer, without.full_attention_layers) == ([2, 3, 4], [1])


def test_a_sequence_must_reach_the_predicted_token():
    with pytest.raises(ConfigError, match=r"model\.mtp\.layers=8: no sequence of 8 tokens"):
        load_config(None, ["model.mtp.layers=8", "data.sequence_length=8"])
    with pytest.raises(ConfigError, match="does not match the layers"):
        load_config(None, ["model.mtp.layers=1", "model.moe.experts_by_layer=[4,4,4,4]"])
