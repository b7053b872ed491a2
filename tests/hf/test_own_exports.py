"""Our exports are imported unchanged, also after transformers has saved them again."""

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
from dynmoe.hf.fields import FAMILIES, FIXED, IGNORED, KEPT
from dynmoe.hf.importing import import_checkpoint
from dynmoe.trained import open_decoder
from tests.hf.cases import OWN, STANDARD, begin, run_decoder, some_tokens
from tests.hf.test_export import read
from tests.hf.test_import import imported

CPU = torch.device("cpu")
QWEN2 = ["qwen2_moe", "qwen2_moe, shared and dense"]
# Other results of training, and rarer options.
FURTHER = {
    "layers of different sizes": [
        "model.router.kind=top_any", "model.moe.experts_by_layer=[4,3,6]", "model.moe.experts=6",
        "model.moe.active_at_start=3", "model.router.scale=3", "model.router.min_experts=2",
        "model.router.max_experts=5",
    ],
    "layers without most experts of the start": [
        "model.router.kind=top_any", "model.router.variant=improved", "model.moe.experts_by_layer=[4,1,6]",
        "model.moe.experts=6", "model.router.initial_experts=null",
    ],
    "heads of another width in all": [
        "model.hidden=32", "model.heads=3", "model.kv_heads=1", "model.head_dim=10", "model.router.kind=top_p",
    ],
    "dense, heads of another width in all": ["model.moe.experts=0", "model.heads=3", "model.head_dim=12"],
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
    """Changes fields in the config.json of an export."""
    path = out / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return out


@pytest.mark.parametrize("name", ALL)
def test_export_import_and_export_again_give_the_same_files(corpus_dir, tmp_path, name):
    """Compares every field and tensor, and the settings of routers and budget."""
    run = begun(corpus_dir, tmp_path, name)
    export(run.path, tmp_path / "out")
    import_checkpoint(tmp_path / "out", tmp_path / "again")
    export(tmp_path / "again", tmp_path / "out_again")
    first, second = (json.loads((tmp_path / out / "config.json").read_text()) for out in ("out", "out_again"))
    assert second == first
    there, here = (load_file(tmp_path / out / "model.safetensors") for out in ("out", "out_again"))
    assert here.keys() == there.keys()
    assert all(torch.equal(here[key], there[key]) for key in there)
    before = run.config
    after = load_config(tmp_path / "again" / "config.yaml")
    assert after.model.router.resolved == before.model.router.resolved
    assert after.model.router.loss_coefficients() == before.model.router.loss_coefficients()
    assert (after.model.moe_layers, after.model.moe_size) == (before.model.moe_layers, before.model.moe_size)
    for field in ("method", "experts_per_token", "scope", "proportional", "integral", "rate"):
        assert getattr(after.budget, field) == getattr(before.budget, field), field
    for router in (layer.router for layer in open_decoder(tmp_path / "again", CPU).decoder.moe_layers):
        assert bool(getattr(router, "calibrated", True)), "the first scores would reset its thresholds"


@pytest.mark.parametrize("name", FURTHER)
def test_transformers_gives_the_logits_of_the_run(corpus_dir, tmp_path, name):
    run = begun(corpus_dir, tmp_path, name)
    export(run.path, tmp_path / "out")
    expected = run_decoder(run.decoder, some_tokens())[0]
    torch.testing.assert_close(logits_of(tmp_path / "out"), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("how", ["saved again", "in bf16", "experts in one tensor"])
@pytest.mark.parametrize("name", [*QWEN2, "top_any improved", "everything", "expert_threshold", "top_k, biased"])
def test_exports_saved_again_by_transformers_keep_their_logits(corpus_dir, tmp_path, name, how):
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


def test_the_l1_coefficient_of_relu_routers_is_kept(corpus_dir, tmp_path):
    """Training needs many steps to adapt it."""
    export(begun(corpus_dir, tmp_path, "relu").path, tmp_path / "out")
    router = json.loads((tmp_path / "out" / "config.json").read_text())["router"]
    assert router["l1"] == pytest.approx([1e-8] * 3)
    changed(tmp_path / "out", router=router | {"l1": [1e-4, 2e-4, 3e-4]})
    _, decoder = imported(tmp_path / "out", tmp_path / "run")
    assert [layer.router.l1.item() for layer in decoder.moe_layers] == pytest.approx([1e-4, 2e-4, 3e-4])
    for wrong in ([1e-4], [1e-4, 0.0, 1e-4], 1e-4, ["a"] * 3):
        changed(tmp_path / "out", router=router | {"l1": wrong})
        with pytest.raises(UserError, match=r"config\.json: router\.l1=.*: must be 3 positive numbers, one per MoE"):
            import_checkpoint(tmp_path / "out", tmp_path / "wrong")


@pytest.mark.parametrize("kind", ["relu", "expert_threshold"])
def test_an_older_export_without_a_budget_requires_one(corpus_dir, tmp_path, kind):
    export(begun(corpus_dir, tmp_path, kind).path, tmp_path / "out")
    router = json.loads((tmp_path / "out" / "config.json").read_text())["router"]
    older = {"kind": kind, "form": "paper", "renormalize": False, "balance_per_route": False, "losses": {}}
    if kind == "relu":
        older["max_experts"] = router["max_experts"]
    changed(tmp_path / "out", router=older)
    with pytest.raises(
        UserError, match=rf"^budget\.experts_per_token=None: is needed by the {kind} router; set a number$"
    ):
        import_checkpoint(tmp_path / "out", tmp_path / "run")
    _, decoder = imported(tmp_path / "out", tmp_path / "run", "budget.experts_per_token=3")
    found = run_decoder(decoder, some_tokens())[0]
    torch.testing.assert_close(found, logits_of(tmp_path / "out"), rtol=0, atol=1e-5)


# Settings that all change the logits.
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
def test_changed_router_settings_give_the_logits_of_transformers(corpus_dir, tmp_path, name):
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
    """The logits of transformers."""
    return read(out, dtype=torch.float32)(some_tokens()).logits


def test_changed_fields_give_the_logits_of_transformers(corpus_dir, tmp_path):
    export(begun(corpus_dir, tmp_path, "everything").path, tmp_path / "out")
    before = (tmp_path / "out" / "config.json").read_text()
    base = {"rope_theta": 90.0, "rope_parameters": {"rope_type": "default", "rope_theta": 90.0}}
    for number, fields in enumerate([base, {"rms_norm_eps": 0.1}, {"count_experts": True}, {"use_cache": False}]):
        (tmp_path / "out" / "config.json").write_text(before)
        changed(tmp_path / "out", **fields)
        _, decoder = imported(tmp_path / "out", tmp_path / f"run_{number}")
        found = run_decoder(decoder, some_tokens())[0]
        torch.testing.assert_close(found, logits_of(tmp_path / "out"), rtol=0, atol=1e-5, msg=str(fields))


def test_every_field_of_our_configuration_is_in_one_table():
    names = inspect.signature(DynMoEConfig.__init__).parameters.keys() - {"self", "kwargs"}
    ours = FAMILIES["dynmoe"]
    tables = [ours.converted, FIXED | ours.fixed, ours.ignored | IGNORED, KEPT]
    assert {name for name in names if sum(name in table for table in tables) != 1} == set()
    assert {"layer_experts", "router"} < names


@pytest.mark.parametrize(("fields", "words"), [
    ({"router": {"kind": "top_q"}}, r"router\.kind='top_q': unknown router"),
    ({"router": {"kind": ["top_p"]}}, r"router\.kind=\['top_p'\]: unknown router"),
    ({"router": {"k": 2}}, r"config\.json: router\.kind is missing; restore"),
    ({"router": {"form": "paper", "losses": {"other": 1.0}}}, r"router\.losses\.other=1\.0: unknown to this"),
    ({"router": {"form": "paper", "losses": 3}}, r"router\.losses=3: must be a mapping"),
    ({"router": {"noise": 1.0}}, r"router\.noise=1\.0: unknown to this version; remove it if the model"),
    ({"router": {"cutoff": 0.6}}, r"router\.cutoff=0\.6: unknown to this version"),
    ({"router": {"min_experts": "few"}}, r"model\.router\.min_experts"),
    ({"router": {"variant": "drafted"}}, r"model\.router\.variant='drafted'"),
    ({"router": {"budget": {"speed": 1}}}, r"router\.budget\.speed=1: unknown to this version"),
    ({"layer_experts": [4, 4]}, r"layer_experts=\[4, 4\]: must be 3 integers, one per layer"),
    ({"layer_experts": 4}, r"layer_experts=4: must be 3 integers"),
    (
        {"layer_experts": [4, 4, 0]},
        r"layer_experts=\[4, 4, 0\]: dense layers are \[2\]; only experts in every n-th layer, from some layer on,",
    ),
    ({"layer_experts": [4, 0, 4]}, r"unexpected: model\.layers\.1\.mlp"),
    ({"rope_theta": 90.0}, r"rope_parameters: rope_theta=10000\.0: must equal rope_theta=90\.0"),
    ({"qk_norm": "head"}, r"missing: model\.layers\.0\.self_attn\.k_norm"),
    ({"auto_map": {"AutoConfig": "configuration_other.OtherConfig"}}, r"auto_map=.*: must refer to our own code"),
    ({"router_overrides": {"p": 0.9}}, r"router_overrides=\{'p': 0\.9\}: only None can be imported"),
    ({"hidden_act": "gelu"}, r"hidden_act='gelu'"),
    ({"something_new": 1}, r"something_new=1: its effect is unknown"),
    ({"architectures": ["DynMoEForSequenceClassification"]}, r"architectures=.*only \['DynMoEForCausalLM'\]"),
    ({"moe_intermediate_size": None}, r"moe_intermediate_size is missing"),
])  # fmt: skip
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


GATE = "layers.0.mlp.shared_expert_gate.weight"


@pytest.mark.parametrize(
    ("name", "part"), [(QWEN2[0], GATE), *((name, "layers.1.self_attn.k_proj.bias") for name in QWEN2)]
)
def test_nonzero_biases_and_gates_without_an_expert_are_refused(corpus_dir, tmp_path, name, part):
    export(begun(corpus_dir, tmp_path, name).path, tmp_path / "out")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert not weights[f"model.{part}"].any()
    weights[f"model.{part}"].view(-1)[-1] = 1e-6
    save_file(weights, tmp_path / "out" / "model.safetensors")
    with pytest.raises(UserError, match=rf"not zeros: model\.{part}; .* frozen: requires_grad_\(False\)$"):
        import_checkpoint(tmp_path / "out", tmp_path / "run")


def test_a_fine_tuned_gate_of_a_shared_expert_is_imported(corpus_dir, tmp_path):
    export(begun(corpus_dir, tmp_path, QWEN2[1]).path, tmp_path / "out")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    before = logits_of(tmp_path / "out")
    weights[f"model.{GATE}"].normal_(generator=torch.Generator().manual_seed(0))
    save_file(weights, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    _, decoder = imported(tmp_path / "out", tmp_path / "run")
    expected = logits_of(tmp_path / "out")
    assert (expected - before).abs().max() > 1e-2
    torch.testing.assert_close(run_decoder(decoder, some_tokens())[0], expected, rtol=0, atol=1e-5)


def test_a_qwen2_moe_with_biases_is_refused(tmp_path):
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
    words = r"not zeros: model\.layers\.0\.self_attn\.q_proj\.bias, .* and 1 more; our decoder has no biases"
    with pytest.raises(UserError, match=words):
        import_checkpoint(tmp_path / "source", tmp_path / "run")


@pytest.mark.parametrize("quantized", [False, True])
def test_a_folder_converted_by_mlx_lm_is_refused(corpus_dir, tmp_path, quantized):
    export(begun(corpus_dir, tmp_path, "qwen3_moe").path, tmp_path / "out")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    made = {name.replace(".experts.", ".switch_mlp."): weight for name, weight in weights.items()}
    save_file(made, tmp_path / "out" / "model.safetensors", metadata={"format": "mlx"})
    if quantized:
        said = {"group_size": 64, "bits": 4, "mode": "affine"}
        changed(tmp_path / "out", quantization=said, quantization_config=said)
    words = r"model\.safetensors: mlx-lm converted it .*; import the original checkpoint$"
    with pytest.raises(UserError, match=words):
        import_checkpoint(tmp_path / "out", tmp_path / "run")


def test_a_megatron_run_starts_with_the_state_of_routers_too(corpus_dir, tmp_path):
    run = begun(corpus_dir, tmp_path, "top_any improved")
    export(run.path, tmp_path / "out")
    import_checkpoint(tmp_path / "out", tmp_path / "run", ["engine=megatron"])
    decoder = open_decoder(tmp_path / "run", CPU).decoder
    for before, after in zip(run.decoder.moe_layers, decoder.moe_layers, strict=True):
        assert torch.equal(after.router.offset_E, before.router.offset_E)
        assert before.router.offset_E.any()
        assert after.router.calibrated
    found, expected = (run_decoder(model, some_tokens())[0] for model in (decoder, run.decoder))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
