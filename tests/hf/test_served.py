"""Features of an exported model that servers and compilers require."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dynmoe.hf.configuration_dynmoe import DynMoEConfig
from dynmoe.hf.export import export
from tests.hf.cases import OWN, begin, run_decoder, some_tokens
from tests.hf.test_export import read


@pytest.fixture(autouse=True)
def _forgets_graphs():
    """Clears compiled graphs: torch.compile keeps at most eight per function."""
    torch._dynamo.reset()


def exported(corpus_dir, tmp_path, name, *overrides):
    run = begin(corpus_dir, tmp_path / "run", [*OWN[name], *overrides])
    export(run.path, tmp_path / "out", own_code=True)
    return run


FAST = ("top_p", "everything")


@pytest.mark.parametrize("name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in OWN])
def test_a_model_compiles_to_one_graph(corpus_dir, tmp_path, name):
    """torch.compile and torch.export work without a graph break and give the same logits."""
    exported(corpus_dir, tmp_path, name)
    model = read(tmp_path / "out", use_cache=False)
    tokens = some_tokens()
    with torch.no_grad():
        expected = model(tokens).logits
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(tokens).logits, expected, rtol=0, atol=1e-5)
        program = torch.export.export(model, (tokens,), strict=False)
    torch.testing.assert_close(program.module()(tokens).logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["top_p", pytest.param("top_any improved", marks=pytest.mark.slow)])
def test_a_compiled_graph_has_the_same_gradients(corpus_dir, tmp_path, name):
    exported(corpus_dir, tmp_path, name)
    tokens = some_tokens()
    gradients = []
    for compiles in (False, True):
        model = read(tmp_path / "out", use_cache=False).train()
        run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiles else model
        run(tokens, labels=tokens, output_router_logits=True).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for parameter, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][parameter], gradient, rtol=0, atol=1e-5, msg=parameter)


def test_experts_are_counted_if_configured(corpus_dir, tmp_path):
    run = exported(corpus_dir, tmp_path, "top_p")
    model = read(tmp_path / "out", count_experts=True)
    tokens = some_tokens()
    _, maps = run_decoder(run.decoder, tokens)
    with torch.no_grad():
        model(tokens)
        model(F.pad(tokens, (3, 0)), attention_mask=F.pad(torch.ones_like(tokens), (3, 0)))
    taken = [int(map_BSE.sum()) for map_BSE in maps]
    assert model.model.expert_counts == [[2 * tokens.numel(), 2 * count] for count in taken]
    with pytest.raises(ValueError, match="count_experts=False: experts are not counted; load the model with"):
        _ = read(tmp_path / "out").model.expert_counts


@pytest.mark.parametrize(
    ("name", "overrides", "most"),
    [
        ("top_p", {"max_experts": 1}, 1), ("top_p", {"p": 0.05}, 1), ("top_p", {"p": 1.0}, 4),
        ("top_any", {"min_experts": 2, "max_experts": 2}, 2), ("top_any released", {"max_experts": 1}, 1),
        ("sigmoid", {"cutoff": 0.001}, 4), ("relu", {"max_experts": 2}, 2), ("top_k, biased", {"k": 3}, 3),
    ],
)  # fmt: skip
def test_experts_per_token_can_be_set(corpus_dir, tmp_path, name, overrides, most):
    exported(corpus_dir, tmp_path, name)
    with torch.no_grad():
        found = read(tmp_path / "out", router_overrides=overrides)(some_tokens(), output_router_logits=True)
        before = read(tmp_path / "out")(some_tokens(), output_router_logits=True)
    assert found.experts_per_token.max() == most
    assert not torch.equal(found.logits, before.logits)


@pytest.mark.parametrize(
    ("router", "overrides", "words"),
    [
        ({"kind": "expert_threshold"}, {"k": 2}, "router_overrides.k=2: router.kind='expert_threshold' has no such "
         "setting; its experts per token cannot be set"),
        ({"kind": "top_p"}, {"k": 2}, "router_overrides.k=2: router.kind='top_p' has no such setting; use "
         "min_experts or max_experts or p"),
        ({"kind": "top_any", "variant": "released"}, {"min_experts": 2}, "has no such setting; use max_experts"),
        ({"kind": "top_p"}, {"p": 1.5}, "router_overrides.p=1.5: is too large; use a value of at most 1"),
        ({"kind": "top_k", "k": 2}, {"k": 5}, "router_overrides.k=5: is more than there are experts; use at most "
         "the number of experts (4)"),
        ({"kind": "sigmoid"}, {"min_experts": True}, "router_overrides.min_experts=True: must be an integer"),
        ({"kind": "top_p", "min_experts": 3}, {"max_experts": 2}, "router_overrides.max_experts=2: is below "
         "min_experts; use at least router_overrides.min_experts (3)"),
    ],
)  # fmt: skip
def test_invalid_router_overrides_are_refused(router, overrides, words):
    with pytest.raises(ValueError, match=r"^router_overrides") as caught:
        DynMoEConfig(num_hidden_layers=2, layer_experts=[4, 0], router=router, router_overrides=overrides)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["top_p", "top_any", "sigmoid", "top_k", "expert_threshold", "identity_experts"])
def test_a_model_from_the_meta_device_is_initialized(kind):
    """from_pretrained and servers create the model on the meta device and then fill it."""
    from dynmoe.hf.modeling_dynmoe import DynMoEForCausalLM

    router = {"kind": kind, "losses": {}, "k": 2, "cutoff": 0.5, "p": 0.3}
    config = DynMoEConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, layer_experts=[4, 4],
        moe_intermediate_size=24, router=router, count_experts=True,
    )  # fmt: skip
    with torch.device("meta"):
        model = DynMoEForCausalLM(config)
    model.to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.fill_(True)
    model.init_weights()
    fresh = DynMoEForCausalLM(config)
    for (name, found), wanted in zip(model.named_buffers(), fresh.buffers(), strict=True):
        assert torch.equal(found, wanted), name
    assert model.model.layers[0].mlp.router.active.all()


def tensor_parallel(path):
    """The logits, and the fraction of a stack of experts on this rank, one of two."""
    import torch.distributed as dist
    from transformers import AutoModelForCausalLM

    assert dist.get_world_size() == 2
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, tp_plan="auto").eval()
    with torch.no_grad():
        logits = model(some_tokens()).logits
    weight = model.model.layers[0].mlp.experts.down_proj
    return logits, weight.to_local().numel() / weight.numel()


@pytest.mark.parametrize("name", ["top_p", "top_any improved", "everything"])
def test_two_tensor_parallel_ranks_give_the_logits_of_one(corpus_dir, tmp_path, two_ranks, name):
    run = exported(corpus_dir, tmp_path, name, "model.kv_heads=2", "model.moe.expert_hidden=16")
    expected, _ = run_decoder(run.decoder, some_tokens())
    for logits, share in two_ranks.run(tensor_parallel, str(tmp_path / "out")):
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
        assert share == 0.5
