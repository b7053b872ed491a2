"""What we export comes back as it went out, also when transformers has saved it again."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dynmoe.config import load_config
from dynmoe.errors import UserError
from dynmoe.hf.configuration_dynmoe import DynMoEConfig
from dynmoe.hf.export import export
from dynmoe.hf.fields import FAMILIES, FIXED, INDIFFERENT, KEPT
from dynmoe.hf.importing import import_checkpoint
from dynmoe.trained import open_decoder
from tests.hf.cases import OWN, STANDARD, begin, run_decoder, some_tokens
from tests.hf.test_export import read
from tests.hf.test_import import imported

CPU = torch.device("cpu")
QWEN2 = ["qwen2_moe", "qwen2_moe, shared and dense"]
# What trainings change besides, and the rarer options.
FURTHER = {
    "layers of different sizes": [
        "model.router.kind=top_any", "model.moe.experts_by_layer=[4,3,6]", "model.moe.experts=6",
        "model.moe.active_at_start=3", "model.router.scale=3", "model.router.min_experts=2",
    ],
    "held": [
        "model.router.kind=sigmoid", "model.router.cutoff=0.4", "model.router.max_experts=3", "budget.rate=0.2",
        "budget.method=loss_free", "budget.experts_per_token=2", "budget.start=3", "budget.over_steps=9",
        "model.moe.moe_layer_freq=3", "model.moe.shared_hidden=8", "model.qk_norm=head",
    ],
    "of all layers together": [
        "model.router.kind=relu", "model.router.max_experts=3", "budget.experts_per_token=1.5", "budget.scope=global",
        "budget.integral=0.3",
    ],
    "balanced in each sequence": [
        "model.router.kind=top_p", "model.router.variant=improved", "model.router.balance_scope=sequence",
        "model.router.entropy_loss=0", "model.router.z_loss=1e-3", "model.router.p=0.7", "model.router.lr_factor=0.5",
    ],
    "dense, with norms": ["model.moe.experts=0", "model.qk_norm=head"],
}  # fmt: skip
ALL = {**STANDARD, **OWN, **FURTHER}


def begun(corpus: Path, folder: Path, name: str):
    return begin(corpus, folder / name.replace(" ", "_").replace(",", ""), ALL[name])


def changed(out: Path, **fields) -> Path:
    """The export with other fields in its config.json."""
    path = out / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return out


@pytest.mark.parametrize("name", ALL)
def test_a_run_goes_out_and_in_and_out_the_same(corpus_dir, tmp_path, name):
    """Every field and tensor, and state between steps that no tensor of an export holds."""
    run = begun(corpus_dir, tmp_path, name)
    export(run.path, tmp_path / "out")
    import_checkpoint(tmp_path / "out", tmp_path / "again")
    export(tmp_path / "again", tmp_path / "out_again")
    first, second = (json.loads((tmp_path / out / "config.json").read_text()) for out in ("out", "out_again"))
    assert second == first
    there, here = (load_file(tmp_path / out / "model.safetensors") for out in ("out", "out_again"))
    assert here.keys() == there.keys()
    assert all(torch.equal(here[key], there[key]) for key in there)
    before, after = run.config, load_config(tmp_path / "again" / "config.yaml")
    assert after.model.router.resolved == before.model.router.resolved
    assert after.model.router.loss_coefficients() == before.model.router.loss_coefficients()
    assert (after.model.moe_layers, after.model.moe_size) == (before.model.moe_layers, before.model.moe_size)
    for field in ("method", "experts_per_token", "scope", "proportional", "integral", "rate"):
        assert getattr(after.budget, field) == getattr(before.budget, field), field
    for router in (layer.router for layer in open_decoder(tmp_path / "again", CPU).decoder.moe_layers):
        assert bool(getattr(router, "calibrated", True)), "the first scores would set its thresholds anew"


@pytest.mark.parametrize("how", ["saved again", "in bf16", "experts in one tensor"])
@pytest.mark.parametrize("name", [*QWEN2, "top_any improved", "everything", "expert_threshold", "top_k, biased"])
def test_what_transformers_saves_again_has_its_logits(corpus_dir, tmp_path, name, how):
    out = tmp_path / "out"
    export(begun(corpus_dir, tmp_path, name).path, out)
    model = read(out, dtype=torch.bfloat16 if how == "in bf16" else torch.float32)
    if how == "experts in one tensor":
        save_file({key: tensor.clone() for key, tensor in model.state_dict().items()}, out / "model.safetensors")
    else:
        out = tmp_path / "again"
        model.save_pretrained(out)
    _, decoder = imported(out, tmp_path / "run")
    found, maps = run_decoder(decoder, some_tokens())
    torch.testing.assert_close(found, logits_of(out), rtol=0, atol=1e-5)
    assert len(maps) == len(decoder.moe_layers) > 0


def test_the_coefficient_of_the_relu_routers_goes_on(corpus_dir, tmp_path):
    """It takes a training many steps to find it."""
    export(begun(corpus_dir, tmp_path, "relu").path, tmp_path / "out")
    router = json.loads((tmp_path / "out" / "config.json").read_text())["router"]
    assert router["l1"] == pytest.approx([1e-8] * 3)
    changed(tmp_path / "out", router=router | {"l1": [1e-4, 2e-4, 3e-4]})
    _, decoder = imported(tmp_path / "out", tmp_path / "run")
    assert [layer.router.l1.item() for layer in decoder.moe_layers] == pytest.approx([1e-4, 2e-4, 3e-4])
    for wrong in ([1e-4], [1e-4, 0.0, 1e-4], 1e-4, ["a"] * 3):
        changed(tmp_path / "out", router=router | {"l1": wrong})
        with pytest.raises(UserError, match=r"config\.json: router\.l1=.* is not a positive number for each of 3"):
            import_checkpoint(tmp_path / "out", tmp_path / "wrong")


@pytest.mark.parametrize("kind", ["relu", "expert_threshold"])
def test_an_older_export_that_says_no_budget_asks_for_one(corpus_dir, tmp_path, kind):
    export(begun(corpus_dir, tmp_path, kind).path, tmp_path / "out")
    router = json.loads((tmp_path / "out" / "config.json").read_text())["router"]
    older = {"kind": kind, "form": "paper", "renormalize": False, "balance_per_route": False, "losses": {}}
    if kind == "relu":
        older["max_experts"] = router["max_experts"]
    changed(tmp_path / "out", router=older)
    with pytest.raises(UserError, match=r"^budget\.experts_per_token=None: is needed to hold a budget; say how many$"):
        import_checkpoint(tmp_path / "out", tmp_path / "run")
    _, decoder = imported(tmp_path / "out", tmp_path / "run", "budget.experts_per_token=3")
    found = run_decoder(decoder, some_tokens())[0]
    torch.testing.assert_close(found, logits_of(tmp_path / "out"), rtol=0, atol=1e-5)


# Other settings, each with other logits.
SETTINGS = {
    "top_k, biased": [{"k": 3}, {"renormalize": True}],
    "top_p": [{"renormalize": True}, {"min_experts": 3}, {"max_experts": 1}],
    "top_any": [{"min_experts": 3}, {"max_experts": 1}, {"weights": "score"}, {"weights": "score", "scale": 2.0}],
    "top_any improved": [{"renormalize": False}, {"min_experts": 3}, {"max_experts": 1}, {"weights": "uniform"}],
    "sigmoid": [{"renormalize": True}, {"min_experts": 3}, {"max_experts": 1}, {"cutoff": 0.6}],
    "expert_threshold": [{"renormalize": True}],
    "relu": [{"max_experts": 2}],
    "null_experts": [{"k": 2}, {"renormalize": False}],
}


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_of_a_router_is_what_transformers_takes_it_for(corpus_dir, tmp_path, name):
    export(begun(corpus_dir, tmp_path, name).path, tmp_path / "out")
    router = json.loads((tmp_path / "out" / "config.json").read_text())["router"]
    seen = [logits_of(tmp_path / "out")]
    for number, settings in enumerate(SETTINGS[name]):
        changed(tmp_path / "out", router=router | settings)
        expected = logits_of(tmp_path / "out")
        assert not any(torch.equal(expected, logits) for logits in seen), settings
        seen.append(expected)
        _, decoder = imported(tmp_path / "out", tmp_path / f"run_{number}")
        found = run_decoder(decoder, some_tokens())[0]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5, msg=str(settings))


@torch.no_grad()
def logits_of(out: Path) -> torch.Tensor:
    """What transformers computes."""
    return read(out, dtype=torch.float32)(some_tokens()).logits


def test_fields_of_the_file_are_what_transformers_takes_them_for(corpus_dir, tmp_path):
    export(begun(corpus_dir, tmp_path, "everything").path, tmp_path / "out")
    before = (tmp_path / "out" / "config.json").read_text()
    base = {"rope_theta": 90.0, "rope_parameters": {"rope_type": "default", "rope_theta": 90.0}}
    for number, fields in enumerate([base, {"rms_norm_eps": 0.1}, {"count_experts": True}, {"use_cache": False}]):
        (tmp_path / "out" / "config.json").write_text(before)
        changed(tmp_path / "out", **fields)
        _, decoder = imported(tmp_path / "out", tmp_path / f"run_{number}")
        found, expected = run_decoder(decoder, some_tokens())[0], logits_of(tmp_path / "out")
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5, msg=str(fields))


def test_every_field_of_our_configuration_is_in_one_table():
    names = inspect.signature(DynMoEConfig.__init__).parameters.keys() - {"self", "kwargs"}
    ours = FAMILIES["dynmoe"]
    tables = [ours.honoured, FIXED | ours.fixed, ours.indifferent | INDIFFERENT, KEPT]
    assert {name for name in names if sum(name in table for table in tables) != 1} == set()
    assert {"layer_experts", "router"} < names


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"router": {"kind": "top_q"}}, r"router\.kind='top_q' is not known here"),
        ({"router": {"kind": ["top_p"]}}, r"router\.kind=\['top_p'\] is not known here"),
        ({"router": {"k": 2}}, r"config\.json: router\.kind is missing; restore"),
        ({"router": {"form": "paper", "losses": {"other": 1.0}}}, r"router\.losses\.other=1\.0: is not known to this"),
        ({"router": {"form": "paper", "losses": 3}}, r"router\.losses=3 is not a mapping"),
        ({"router": {"noise": 1.0}}, r"router\.noise=1\.0: is not known to this version; remove it if the model"),
        ({"router": {"cutoff": 0.6}}, r"router\.cutoff=0\.6: is not known to this version"),
        ({"router": {"min_experts": "few"}}, r"model\.router\.min_experts"),
        ({"router": {"variant": "drafted"}}, r"model\.router\.variant='drafted'"),
        ({"router": {"budget": {"speed": 1}}}, r"router\.budget\.speed=1: is not known to this version"),
        ({"layer_experts": [4, 4]}, r"layer_experts=\[4, 4\] is not a number for each of 3 layers"),
        ({"layer_experts": 4}, r"layer_experts=4 is not a number for each"),
        ({"layer_experts": [0, 4, 4]}, r"layer_experts=\[0, 4, 4\] leave experts in all layers but \[0\]"),
        ({"layer_experts": [4, 0, 4]}, r"surplus: model\.layers\.1\.mlp"),
        ({"rope_theta": 90.0}, r"rope_parameters: rope_theta=10000\.0: our code has rope_theta=90\.0"),
        ({"qk_norm": "head"}, r"missing: model\.layers\.0\.self_attn\.k_norm"),
        ({"auto_map": {"AutoConfig": "configuration_other.OtherConfig"}}, r"auto_map=.*only our own code"),
        ({"router_overrides": {"p": 0.9}}, r"router_overrides=\{'p': 0\.9\}: only None can be imported"),
        ({"hidden_act": "gelu"}, r"hidden_act='gelu'"),
        ({"something_new": 1}, r"something_new=1: what it does is not known here"),
        ({"architectures": ["DynMoEForSequenceClassification"]}, r"architectures=.*only \['DynMoEForCausalLM'\]"),
        ({"moe_intermediate_size": None}, r"moe_intermediate_size is missing"),
    ],
)
def test_fields_that_no_export_has_are_refused(corpus_dir, tmp_path, fields, words):
    export(begun(corpus_dir, tmp_path, "top_p").path, tmp_path / "out")
    router = json.loads((tmp_path / "out" / "config.json").read_text())["router"]
    if "router" in fields:
        merged = router | fields["router"] if fields["router"] != {"k": 2} else fields["router"]
        fields = {"router": merged}
    changed(tmp_path / "out", **fields)
    with pytest.raises(UserError, match=words) as refused:
        import_checkpoint(tmp_path / "out", tmp_path / "run")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("part", ["layers.1.self_attn.k_proj.bias", "layers.0.mlp.shared_expert_gate.weight"])
@pytest.mark.parametrize("name", QWEN2)
def test_biases_and_gates_that_say_something_are_refused(corpus_dir, tmp_path, name, part):
    export(begun(corpus_dir, tmp_path, name).path, tmp_path / "out")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert not weights[f"model.{part}"].any()
    weights[f"model.{part}"].view(-1)[-1] = 1e-6
    save_file(weights, tmp_path / "out" / "model.safetensors")
    with pytest.raises(UserError, match=rf"not zeros: model\.{part}; .* frozen: requires_grad_\(False\)$"):
        import_checkpoint(tmp_path / "out", tmp_path / "run")


def test_a_qwen2_moe_of_its_own_is_refused_by_name(tmp_path):
    import transformers

    config = transformers.Qwen2MoeConfig(
        vocab_size=96, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, moe_intermediate_size=24, shared_expert_intermediate_size=16, num_experts=4,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.fill_(0.1)
    model.save_pretrained(tmp_path / "source")
    words = r"not zeros: model\.layers\.0\.self_attn\.q_proj\.bias, .* and 3 more; our decoder has neither biases nor"
    with pytest.raises(UserError, match=words):
        import_checkpoint(tmp_path / "source", tmp_path / "run")


@pytest.mark.parametrize("quantized", [False, True])
def test_a_folder_of_mlx_lm_is_called_so(corpus_dir, tmp_path, quantized):
    export(begun(corpus_dir, tmp_path, "qwen3_moe").path, tmp_path / "out")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    made = {name.replace(".experts.", ".switch_mlp."): weight for name, weight in weights.items()}
    save_file(made, tmp_path / "out" / "model.safetensors", metadata={"format": "mlx"})
    if quantized:
        said = {"group_size": 64, "bits": 4, "mode": "affine"}
        changed(tmp_path / "out", quantization=said, quantization_config=said)
    words = r"model\.safetensors: mlx-lm has converted it, .*; import the folder that it was converted from$"
    with pytest.raises(UserError, match=words):
        import_checkpoint(tmp_path / "out", tmp_path / "run")


def test_a_run_of_megatron_begins_with_the_state_of_routers_too(corpus_dir, tmp_path):
    run = begun(corpus_dir, tmp_path, "top_any improved")
    export(run.path, tmp_path / "out")
    import_checkpoint(tmp_path / "out", tmp_path / "run", ["engine=megatron"])
    decoder = open_decoder(tmp_path / "run", CPU).decoder
    for before, after in zip(run.decoder.moe_layers, decoder.moe_layers, strict=True):
        assert torch.equal(after.router.offset_E, before.router.offset_E)
        assert before.router.offset_E.any()
        assert after.router.calibrated
    torch.testing.assert_close(
        run_decoder(decoder, some_tokens())[0], run_decoder(run.decoder, some_tokens())[0], rtol=0, atol=1e-5
    )
