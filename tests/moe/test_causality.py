"""On which tokens the choice for a token depends: on none that follow in evaluation, and in training as declared."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import pytest
import torch

from dynmoe.config import Config
from dynmoe.model import Decoder
from dynmoe.model.sampling import Sampling, sample, whole_context, with_cache
from dynmoe.moe import MoEContext, MoELayer
from dynmoe.moe.layer import capture_plans
from dynmoe.moe.updates import RouterUpdates
from dynmoe.routers import ROUTERS as KINDS
from dynmoe.routers import TopK
from tests.moe.cases import ATTENTIVE, BASELINES, EXPERTS, HIDDEN, ROUTERS, spread_router, tiny_config

ALL = ROUTERS | BASELINES
DECODERS = ALL | ATTENTIVE
VOCAB = 48
SEQUENCES = 3
LENGTH = 10
KEPT = 6
TARGET = 1.5


def train_steps(config: Config, layers: Sequence[MoELayer], run: Callable[[int], object], steps: int) -> None:
    """Forward passes with the updates of router state that follow them, without an optimizer."""
    context = layers[0].context
    updates = RouterUpdates(config, layers, context.groups, lambda *_: None, torch.device("cpu"))
    with torch.no_grad():
        for step in range(1, steps + 1):
            wanted = updates.spec(step)
            with context.override(update_statistics=wanted, target_experts=updates.target_experts(step)):
                if updates.need_calibration:
                    with context.override(calibrating=True):
                        run(step)
                run(step)
            updates.apply([layer.drain() for layer in layers], wanted, step)


def layer_of(kind: str, steps: int) -> MoELayer:
    """A layer whose router tells tokens apart, after steps on random inputs."""
    config = tiny_config(*ALL[kind])
    layer = MoELayer(config.model, 0, 0, MoEContext())
    spread_router(layer)
    train_steps(config, [layer], lambda step: layer(inputs(step, 64)), steps)
    return layer


def inputs(seed: int, length: int = LENGTH) -> torch.Tensor:
    return torch.randn(SEQUENCES, length, HIDDEN, generator=torch.Generator().manual_seed(seed))


def routing(layer: MoELayer, x_BSD: torch.Tensor) -> torch.Tensor:
    """Map and gates of each token, [B, S, 2 E]."""
    with torch.no_grad(), layer.context.override(target_experts=TARGET):
        plan = layer.router(x_BSD.flatten(0, 1), SEQUENCES)
    return torch.cat([plan.routing_map_TE.float(), plan.gates_TE], dim=1).unflatten(0, x_BSD.shape[:2])


def influences(layer: MoELayer) -> set[str]:
    """Which other tokens change the routing of the first ``KEPT`` tokens of the first sequence."""
    found = set()
    for seed in range(8):
        x = inputs(seed)
        before = routing(layer, x)[0, :KEPT]
        for name, changed in {"later": (0, slice(KEPT, None)), "other": (slice(1, None),)}.items():
            other = x.clone()
            other[changed] = 5.0 * inputs(seed + 100)[changed]
            if not torch.equal(routing(layer, other)[0, :KEPT], before):
                found.add(name)
    return found


EXPECTED = {"token": set(), "sequence": {"later"}, "batch": {"later", "other"}}


@pytest.mark.parametrize("steps", [0, 3], ids=["new", "trained"])
@pytest.mark.parametrize("kind", sorted(ALL))
def test_the_choice_for_a_token_depends_on_the_tokens_that_the_router_declares(kind, steps):
    layer = layer_of(kind, steps)
    assert influences(layer.train()) == EXPECTED[layer.router.spec.selects_among]
    assert influences(layer.eval()) == set()


def test_every_router_is_tested():
    assert {name.split()[0] for name in DECODERS} == set(KINDS)
    assert {spec().selects_among for spec in KINDS.values()} == set(EXPECTED)


@pytest.mark.parametrize("reach", ["sequence", "batch"])
def test_a_router_that_looks_further_than_it_declares_is_found(reach):
    class Leaking(TopK):
        def logits_TE(self, state, x_TD):
            logits_BSE = super().logits_TE(state, x_TD).unflatten(0, (state.scope.num_sequences, -1))
            mean = logits_BSE.mean(dim=1 if reach == "sequence" else (0, 1), keepdim=True)
            return (logits_BSE - mean).flatten(0, 1)

    layer = layer_of("top_k", 0)
    layer.router.spec = Leaking(**dataclasses.asdict(layer.router.spec))
    assert layer.router.spec.selects_among == "token"
    assert influences(layer.eval()) == EXPECTED[reach]


def decoder_of(kind: str, steps: int) -> Decoder:
    config = tiny_config(*DECODERS[kind])
    model = Decoder(config.model, VOCAB, seed=0)
    train_steps(config, model.moe_layers, lambda step: model(tokens(step, 32)), steps)
    return model.eval()


def tokens(seed: int, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(VOCAB, (SEQUENCES, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("steps", [0, 3], ids=["new", "trained"])
@pytest.mark.parametrize("kind", sorted(DECODERS))
def test_the_logits_of_a_prefix_are_those_of_the_prefix_alone(kind, steps):
    model = decoder_of(kind, steps)
    text = tokens(100)
    other = text.clone()
    other[0, KEPT:] = (other[0, KEPT:] + 1) % VOCAB
    other[1:] = (other[1:] + 1) % VOCAB
    with torch.no_grad():
        whole = model(text)[0, :KEPT]
        assert torch.equal(model(other)[0, :KEPT], whole)
        torch.testing.assert_close(model(text[:1, :KEPT])[0], whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", sorted(ATTENTIVE))
def test_a_router_that_needs_attention_looks_back_only_in_training_too(kind):
    """Its choice depends on the tokens so far, which it sees through attention."""
    model = decoder_of(kind, 3).train()
    assert KINDS["da_moe"]().selects_among == "token"
    text = tokens(100)
    for changed, same in (((0, slice(KEPT, None)), True), ((slice(1, None),), True), ((0, slice(0, 1)), False)):
        other = text.clone()
        other[changed] = (other[changed] + 1) % VOCAB
        found = []
        for batch in (text, other):
            with torch.no_grad(), capture_plans(model.moe_layers) as plans:
                model(batch)
            found.append(torch.stack([plan.gates_TE.unflatten(0, batch.shape)[0, 1:KEPT] for plan in plans]))
        assert torch.equal(*found) == same


@pytest.mark.parametrize("kind", sorted(DECODERS))
def test_generation_with_a_cache_equals_evaluation_of_the_whole_text(kind):
    model = decoder_of(kind, 3)
    prompts = tokens(100, 5)
    greedy = {"vocab_size": VOCAB, "sampling": Sampling(temperature=0)}
    with capture_plans(model.moe_layers) as plans:
        cached = list(sample(with_cache(model, torch.zeros(SEQUENCES, dtype=torch.int64)), prompts, 8, **greedy))
        steps = [plan.routing_map_TE.unflatten(0, (SEQUENCES, -1)) for plan in plans]
    assert torch.equal(torch.stack(cached), torch.stack(list(sample(whole_context(model, 64), prompts, 8, **greedy))))
    text = torch.cat([prompts, torch.stack(cached[:-1], dim=1)], dim=1)
    with torch.no_grad(), capture_plans(model.moe_layers) as plans:
        model(text)
    for number, plan in enumerate(plans):
        generated = torch.cat(steps[number :: len(plans)], dim=1)
        assert torch.equal(generated, plan.routing_map_TE.unflatten(0, text.shape))


OWN_RULE = sorted(name for name in ALL if KINDS[name.split()[0]]().selects_among != "token")


@pytest.mark.parametrize("kind", OWN_RULE)
def test_a_new_router_that_selects_among_tokens_uses_few_experts_in_evaluation(kind):
    """Before its cut-offs are known: some, and not all."""
    layer = layer_of(kind, 0).eval()
    used = routing(layer, inputs(0, 200))[..., :EXPERTS].sum(dim=-1).mean().item()
    assert 1.0 <= used <= 3.0


SIZES = {
    "16 experts": ["model.hidden=64", "model.moe.experts=16", "model.init_std=0.1"],
    "64 experts, small logits": ["model.hidden=64", "model.moe.experts=64", "model.init_std=0.01"],
}


@pytest.mark.parametrize("target", [1.5, 3.0])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", sorted({name.split()[0] for name in OWN_RULE}))
def test_evaluation_holds_the_experts_per_token_that_training_selects_exactly(kind, size, target):
    k = ["model.router.k=4"] if kind == "resonance" else []
    config = tiny_config(*SIZES[size], f"model.router.kind={kind}", f"budget.experts_per_token={target}", *k)
    layer = MoELayer(config.model, 0, 0, MoEContext())
    sequences = 16
    length = 512

    def passed(seed: int) -> float:
        generator = torch.Generator().manual_seed(seed)
        x_TD = torch.randn(sequences * length, 64, generator=generator)
        return layer.router(x_TD, sequences).experts_per_token_T.float().mean().item()

    def run(step: int) -> torch.Tensor:
        return layer(torch.randn(sequences, length, 64, generator=torch.Generator().manual_seed(step)))

    train_steps(config, [layer], run, 10)
    with torch.no_grad():
        with layer.context.override(target_experts=target):
            # A quantile is exact to the width of a bin.
            assert passed(100) == pytest.approx(target, abs=1e-3 if kind == "quantile" else 1e-4)
        layer.eval()
        observed = [passed(seed) for seed in range(200, 220)]
    assert sum(observed) / len(observed) == pytest.approx(target, rel=0.02)


@pytest.mark.parametrize("kind", [kind for kind in OWN_RULE if kind != "quantile running"])
def test_training_without_a_budget_is_refused_in_one_line(kind):
    layer = layer_of(kind, 0)
    with pytest.raises(ValueError, match=rf"^target_experts=None: the {kind.split()[0]} router selects by it in .*set"):
        layer(inputs(0))
