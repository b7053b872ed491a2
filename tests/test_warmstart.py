"""A warm start keeps the results of the run that it starts from."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from dynmoe import warmstart
from dynmoe.config import load_config
from dynmoe.data.corpus import Corpus
from dynmoe.errors import UserError
from dynmoe.model import Decoder
from dynmoe.moe.experts import SwiGLU
from dynmoe.moe.upcycling import copy_experts
from dynmoe.routers import ROUTERS, TopP
from dynmoe.trained import open_trained
from dynmoe.warmstart import warm_start
from harness.processes import WarmTraining
from tests.faults.test_corpora import store
from tests.hf.cases import begin
from tests.moe.cases import tiny_model
from tests.train.cases import read_rows

DENSE = ["model.moe.experts=0", "model.ffn_hidden=64"]
TOP_K, TOP_P, DTOP_P, TOP_ANY, SIGMOID = (
    [f"model.router.kind={kind}"] for kind in ("top_k", "top_p", "dtop_p", "top_any", "sigmoid")
)


@pytest.fixture(scope="module")
def dense(tmp_path_factory, corpus_dir) -> Path:
    return begin(corpus_dir, tmp_path_factory.mktemp("dense") / "run", DENSE).path


@pytest.mark.parametrize("router", [TOP_K, TOP_P, DTOP_P, TOP_ANY, SIGMOID], ids=" ".join)
@pytest.mark.parametrize("extra", [[], ["model.moe.moe_layer_freq=2"]], ids=["every layer", "every second"])
def test_copies_keep_the_output(dense, tmp_path, router, extra):
    done = warm_start(dense, tmp_path / "run", experts=4, overrides=[*router, *extra])
    assert done.difference <= 1e-5
    assert done.loss == pytest.approx(done.loss_before, abs=1e-6)
    assert len(done.experts_per_token) == (2 if extra else 3)
    assert all(1 <= count <= 4 for count in done.experts_per_token)


@pytest.mark.parametrize(
    "kind", [kind for kind, spec in ROUTERS.items() if spec.HAS_OWN_RULE and kind not in ("resonance", "expert_race")]
)
def test_a_router_that_needs_a_budget_takes_it_from_the_overrides(dense, tmp_path, kind):
    overrides = [f"model.router.kind={kind}", "budget.experts_per_token=2"]
    done = warm_start(dense, tmp_path / "run", experts=4, overrides=overrides)
    assert (done.config.model.router.kind, done.config.budget.experts_per_token) == (kind, 2)


@pytest.mark.parametrize(
    "router",
    [
        [*TOP_K, "model.router.k=2"], [*TOP_K, "model.router.k=4"], TOP_ANY,
        [*TOP_ANY, "model.router.variant=improved", "model.router.initial_experts=null"], [*TOP_P, "model.router.p=1"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_slices_that_are_selected_together_keep_the_output(dense, tmp_path, router):
    done = warm_start(dense, tmp_path / "run", experts=8, granularity=2, overrides=router)
    assert done.difference <= 1e-5
    assert done.config.model.moe.expert_hidden == 32
    assert all(count >= 2 for count in done.experts_per_token)


def test_validation_text_of_a_blend_has_the_share_of_every_corpus(corpus_dir, tmp_path):
    """p fitted to one corpus would give another number of experts per token on the blend."""
    for number, name in enumerate(("web", "code"), start=7):
        store(Path(shutil.copytree(corpus_dir, tmp_path / name)), "validation", [number] * 64 * 20)
    config = load_config(None, [
        f"data.dirs=[{tmp_path / 'web'},{tmp_path / 'code'}]", "data.weights=[3,1]", "data.sequence_length=64",
    ])  # fmt: skip
    tokens_BS = warmstart._validation_text(config, Corpus.open(corpus_dir).tokenizer)
    assert tokens_BS.tolist() == [[7] * 64] * 6 + [[8] * 64] * 2


def test_slices_are_those_of_the_dense_layer():
    model = tiny_model("model.ffn_hidden=48", "model.moe.experts=4", "model.moe.expert_hidden=24")
    dense = SwiGLU(model, 48, 0, "dense")
    layer = Decoder(model, 32, 0).moe_layers[0]
    copy_experts(dense, layer.experts, granularity=2, seed=0, symmetry_break=0.0)
    up = layer.experts.w_up_EHD
    down = layer.experts.w_down_EDF
    for expert, rows in ((0, range(24)), (1, range(24, 48)), (2, range(24)), (3, range(24, 48))):
        assert torch.equal(up[expert], dense.w_up_HD[[*rows, *(48 + row for row in rows)]])
        assert torch.equal(down[expert], 2 * dense.w_down_DF[:, list(rows)])


@pytest.mark.parametrize("symmetry_break", [0.0, 0.1])
def test_experts_diverge_only_with_a_symmetry_break(symmetry_break):
    """All experts get all tokens with the same gate, so that identical copies stay identical."""
    model = tiny_model(*TOP_ANY, "model.router.initial_experts=null", "model.moe.expert_hidden=48", "model.layers=1")
    decoder = Decoder(model, 32, 0)
    (layer,) = decoder.moe_layers
    copy_experts(SwiGLU(model, 48, 0, "dense"), layer.experts, 1, seed=0, symmetry_break=symmetry_break)
    with torch.no_grad():
        layer.router.thresholds_E.fill_(-20.0)
    experts = [layer.experts.w_up_EHD, layer.experts.w_down_EDF]
    optimizer = torch.optim.Adam(experts, lr=1e-2)
    tokens = torch.randint(32, (4, 17), generator=torch.Generator().manual_seed(0))
    for _ in range(5):
        optimizer.zero_grad()
        decoder(tokens[:, :-1], tokens[:, 1:]).backward()
        optimizer.step()
    x = torch.randn(64, model.hidden, generator=torch.Generator().manual_seed(1))
    gate, up = torch.einsum("td,ehd->eth", x, experts[0]).chunk(2, dim=2)
    outputs = torch.einsum("etf,edf->etd", torch.nn.functional.silu(gate) * up, experts[1])
    apart = float(((outputs[0] - outputs[1]).norm() / outputs[0].norm()).detach())
    assert apart < 1e-5 if symmetry_break == 0 else apart > 1e-3


def test_top_p_starts_with_the_experts_per_token_of_top_k(corpus_dir, tmp_path):
    for renormalize in ("false", "true"):
        fields = [*TOP_K, "model.router.k=2", f"model.router.renormalize={renormalize}", "model.moe.experts=8"]
        run = begin(corpus_dir, tmp_path / f"top_k_{renormalize}", fields)
        done = warm_start(run.path, tmp_path / f"top_p_{renormalize}", overrides=TOP_P)
        assert done.experts_per_token == pytest.approx([2.0] * 3, rel=0.01)
        assert done.loss == pytest.approx(done.loss_before, rel=0.02)
        assert str(done.config.model.router.resolved.renormalize).lower() == renormalize
        layers = open_trained(tmp_path / f"top_p_{renormalize}").decoder.moe_layers
        assert len({float(layer.router.p) for layer in layers}) == 3, "each layer has its own"


def test_layers_that_predict_further_tokens_come_along(corpus_dir, tmp_path):
    """Experts are copies of their feed-forward layers; of top-k, p is fitted there too, and all else is the same."""
    run = begin(corpus_dir, tmp_path / "dense", [*DENSE, "model.mtp.layers=1"])
    upcycled = warm_start(run.path, tmp_path / "top_k", experts=4, overrides=[*TOP_K, "model.router.k=2"])
    assert len(upcycled.experts_per_token) == 3
    before = run.decoder.layers[3]
    middle = open_trained(tmp_path / "top_k", mtp=True).decoder.layers[3]
    copies = middle.moe.experts.w_down_EDF.mean(dim=0)
    torch.testing.assert_close(copies, before.ffn.w_down_DF, rtol=0, atol=0.1)
    warm_start(tmp_path / "top_k", tmp_path / "top_p", overrides=TOP_P)
    after = open_trained(tmp_path / "top_p", mtp=True).decoder.layers[3]
    for name, value in middle.state_dict().items():
        if name.startswith(("join.", "norm.", "attention", "moe.experts.")):
            assert torch.equal(after.state_dict()[name], value), name
    assert float(after.moe.router.p) != TopP().p, "not fitted"
    assert len(open_trained(tmp_path / "top_p").decoder.layers) == 3
    with pytest.raises(UserError, match=r"model.mtp.layers=0: the weights have 1; remove the override"):
        warm_start(tmp_path / "top_k", tmp_path / "without", overrides=[*TOP_P, "model.mtp.layers=0"])


def test_a_warm_start_may_add_layers_that_predict_further_tokens(dense, tmp_path):
    done = warm_start(dense, tmp_path / "run", experts=4, overrides=[*TOP_K, "model.mtp.layers=1"])
    assert done.difference <= 1e-5
    assert len(open_trained(tmp_path / "run", mtp=True).decoder.layers) == 4


def test_p_may_be_fitted_to_another_number(dense, tmp_path):
    done = warm_start(dense, tmp_path / "run", experts=8, experts_per_token=3.0, overrides=TOP_P)
    assert done.experts_per_token == pytest.approx([3.0] * 3, rel=0.01)
    assert done.difference <= 1e-5


@pytest.mark.parametrize("engine", [
    pytest.param(["parallel.expert=2"], id="EP 2"),
    pytest.param(["engine=megatron", "parallel.pipeline=2"], id="Megatron PP 2", marks=pytest.mark.slow),
])  # fmt: skip
def test_training_continues_from_a_warm_start(corpus_dir, tmp_path, engine):
    """Also of the layer that predicts the token after the next."""
    run = begin(corpus_dir, tmp_path / "dense", ["model.layers=4", "model.mtp.layers=1", *DENSE]).path
    fields = [
        "data.sequence_length=32", "train.global_batch=4", "train.micro_batch=2", "optimizer.lr=1e-2",
        "schedule.warmup_steps=0", "logging.interval=1", "eval.batches=2",
    ]  # fmt: skip
    rows = []
    warm_start(run, tmp_path / "warm", experts=4, overrides=[*TOP_P, *fields, *engine])
    for name, steps in (("dense", 1), ("warm", 20)):
        command = [str(tmp_path / name / "config.yaml"), *fields, f"train.steps={steps}"]
        process = WarmTraining(command, 2, 0, tmp_path / f"{name}.txt", {}, None)
        assert process.wait() == 0, process.output()
        rows.append(read_rows(tmp_path / name / "metrics.jsonl"))
    for loss in ("train/lm_loss", "train/mtp_loss"):
        assert rows[1][0][loss] == pytest.approx(rows[0][0][loss], rel=1e-5)
        assert rows[1][-1][loss] < rows[1][0][loss] - 0.5
    for row in rows[0]:
        assert row["train/loss"] == pytest.approx(row["train/lm_loss"] + 0.3 * row["train/mtp_loss"])


@pytest.mark.parametrize(("source", "arguments", "words"), [
    ("dense", {}, "--experts: required, because .* is dense; set the number"),
    ("dense", {"experts": 6, "granularity": 4}, "--granularity=4: must divide 6 experts"),
    ("dense", {"experts": 4, "granularity": 16}, "--granularity=16"),
    (
        "dense",
        {"experts": 8, "granularity": 2, "overrides": ["model.router.kind=top_any", "model.moe.active_at_start=4"]},
        r"model\.moe\.active_at_start=4: with --granularity=2, .*; remove it",
    ),
    ("dense", {"experts": 4, "overrides": ["model.hidden=32"]}, "model.hidden=32: the weights have 16"),
    (
        "dense", {"experts": 4, "overrides": ["model.kv_heads=2", "model.latent.kv_lora_rank=8"]},
        "model.kv_heads=2: the weights have 1",
    ),
    ("dense", {"experts": 4, "experts_per_token": 2.0, "overrides": TOP_ANY}, "--experts-per-token=2.0"),
    ("dense", {"experts": 4, "experts_per_token": 2.0, "overrides": DTOP_P}, "only top_p fits p"),
    ("dense", {"experts": 4, "overrides": ["data.dirs=[nowhere]"]}, "nowhere holds no prepared corpus"),
    ("top_p", {"overrides": TOP_ANY}, "model.router.kind=top_any: a top_p run cannot become top_any"),
    ("top_p", {"experts": 4}, "already has experts"),
    ("dense", {"experts": 4, "overrides": ["model.attention_bias=all"]}, "model.attention_bias=all: the weights have"),
    ("top_k", {"overrides": [*TOP_P, "model.moe.experts=8"]}, "model.moe.experts=8: the weights have 4"),
    ("top_k", {"overrides": [*TOP_P, "model.moe.moe_layer_freq=2"]}, "model.moe.moe_layer_freq=2: the weights have 1"),
    ("top_k", {"overrides": [*TOP_P, "model.moe.shared_hidden=16"]}, "model.moe.shared_hidden=16: the weights have 0"),
])  # fmt: skip
def test_impossible_conversions_are_refused(corpus_dir, dense, tmp_path, source, arguments, words):
    run = dense if source == "dense" else begin(corpus_dir, tmp_path / source, [f"model.router.kind={source}"]).path
    with pytest.raises(UserError, match=words):
        warm_start(run, tmp_path / "run", **arguments)
    assert not (tmp_path / "run").exists()


def test_the_command_prints_the_result(dense, tmp_path, monkeypatch, capsys):
    from dynmoe.warmstart import main

    arguments = [str(dense), str(tmp_path / "run"), "--experts", "4", "--granularity", "2", *TOP_K]
    monkeypatch.setattr("sys.argv", ["warmstart", *arguments])
    main()
    text = capsys.readouterr().out
    assert "2.00 experts per token (by layer: 2.00, 2.00, 2.00)" in text
    assert load_config(tmp_path / "run" / "config.yaml").model.moe.experts == 4
