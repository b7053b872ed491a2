from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
import time
from operator import attrgetter
from pathlib import Path

import pytest
import yaml

from dynmoe.config import Config, describe_fields, load, load_config
from dynmoe.config.guard import GuardConfig
from dynmoe.errors import ConfigError, UserError
from dynmoe.train.resume import check_unchanged, with_kept_fields

ROOT = Path(__file__).parents[2]

# Overrides, and what the one line of the error must contain: field, value, fix.
BAD = [
    ("model.router.q=1", ["model.router.q", "no such field", "model.router.p"]),
    ("modell.layers=1", ["modell", "no such field"]),
    ("train.steps=abc", ["train.steps", "'abc'", "Integer"]),
    ("train.steps=1.5", ["train.steps", "'1.5'"]),
    ("train.steps=null", ["train.steps", "None"]),
    ("train.steps=0", ["train.steps=0", "at least 1"]),
    ("train.steps=-5", ["train.steps=-5", "at least 1"]),
    ("model.router.p=0", ["model.router.p=0", "above 0"]),
    ("model.router.p=1.5", ["model.router.p=1.5", "at most 1"]),
    ("model.router.p=nan", ["model.router.p=nan", "finite"]),
    ("optimizer.lr=inf", ["optimizer.lr=inf", "finite"]),
    ("optimizer.lr=-1", ["optimizer.lr=-1", "above 0"]),
    ("model.router.kind=soft", ["model.router.kind='soft'", "top_any, top_k"]),
    ("model.router.kind=top_k model.router.k=17", ["model.router.k=17", "model.moe.experts (16)"]),
    ("model.router.min_experts=3 model.router.max_experts=2", ["model.router.max_experts=2", "at least"]),
    ("model.router.max_experts=17", ["model.router.max_experts=17", "model.moe.experts (16)"]),
    ("model.router.min_experts=0", ["model.router.min_experts=0", "use 1 or more"]),
    ("model.router.diversity_loss=0.1", ["model.router.diversity_loss=0.1", "top_p", "remove it"]),
    (
        "model.router.kind=top_k model.router.variant=released",
        ["model.router.variant='released'", "is not a variant of the", "router; use paper"],
    ),
    ("model.router.cutoff=0.3", ["model.router.cutoff=0.3", "top_p", "remove it"]),
    ("model.router.weights=score", ["model.router.weights='score'", "top_p", "remove it"]),
    ("model.router.kind=null_experts model.router.k=33", ["model.router.k=33", "zero-computation experts (32)"]),
    (
        "model.router.kind=top_any model.router.variant=released model.router.min_experts=1",
        ["min_experts=1", "the released variant has no minimum"],
    ),
    ("model.router.kind=top_any model.router.initial_experts=17", ["initial_experts=17", "model.moe.experts (16)"]),
    ("model.router.kind=top_any model.router.balance_scope=sequence", ["balance_scope='sequence'", "global_batch"]),
    ("model.moe.active_at_start=4", ["model.moe.active_at_start=4", "top_p", "remove it"]),
    ("model.router.kind=top_any model.moe.active_at_start=17", ["model.moe.active_at_start=17", "at most 16"]),
    ("model.moe.experts_by_layer=[4]", ["model.moe.experts_by_layer=[4]", "4 numbers"]),
    ("model.moe.experts_by_layer=[4,6,3,4] parallel.expert=2", ["parallel.expert=2", "model.moe.experts (3, 4, 6)"]),
    ("budget.method=pi", ["budget.experts_per_token=None", "set a number"]),
    ("budget.experts_per_token=2", ["budget.experts_per_token=2", "set budget.method"]),
    ("budget.method=pi budget.experts_per_token=17", ["budget.experts_per_token=17", "(1 to 16)"]),
    (
        "budget.method=pi budget.experts_per_token=2 budget.start=0.5 budget.over_steps=5",
        ["budget.start=0.5", "(1 to 16)"],
    ),
    ("budget.method=pi budget.experts_per_token=2 budget.start=3", ["budget.start=3", "budget.over_steps"]),
    ("budget.method=pi budget.experts_per_token=2 budget.over_steps=3", ["budget.over_steps=3", "budget.start"]),
    ("budget.method=pi budget.experts_per_token=2 budget.rate=0.1", ["budget.rate=0.1", "remove it"]),
    ("budget.start=3 budget.over_steps=3", ["budget.start=3", "budget.experts_per_token"]),
    (
        "model.router.kind=top_any model.moe.active_at_start=4 budget.method=pi budget.experts_per_token=6",
        ["budget.experts_per_token=6", "(1 to 4)"],
    ),
    ("model.moe.experts=0 budget.experts_per_token=2", ["budget.experts_per_token=2", "dense"]),
    ("model.moe.experts=0 budget.method=pi", ["budget.method='pi'", "dense"]),
    ("model.router.kind=top_any adaptation.interval=10 adaptation.until=5", ["adaptation.interval=10", "update (5)"]),
    ("model.router.kind=top_any model.router.renormalize=false", ["renormalize=False", "weights=score"]),
    (
        "model.router.kind=expert_threshold model.router.min_experts=1 budget.experts_per_token=2",
        ["model.router.min_experts=1", "remove it"],
    ),
    ("budget.method=pi budget.experts_per_token=nan", ["budget.experts_per_token=nan", "finite"]),
    ("model.router.kind=top_k budget.method=pi budget.experts_per_token=2", ["budget.method='pi'", "use none"]),
    ("budget.method=loss_free budget.experts_per_token=2", ["budget.method='loss_free'", "use none or pi"]),
    ("budget.method=quantile budget.experts_per_token=2", ["budget.method='quantile'", "use none or pi"]),
    ("model.router.kind=top_k budget.method=quantile budget.rate=1.5", ["budget.rate=1.5", "use at most 1"]),
    ("model.router.kind=quantile", ["budget.experts_per_token=None", "set a number"]),
    ("model.router.kind=quantile model.router.bins=8", ["model.router.bins=8", "at least 16"]),
    ("model.router.kind=quantile model.router.bins=2048", ["model.router.bins=2048", "at most 1024"]),
    ("model.router.kind=quantile model.router.thresholds=none", ["thresholds='none'", "batch, running"]),
    (
        "model.router.kind=quantile budget.experts_per_token=2 budget.scope=global",
        ["budget.scope='global'", "quantile", "use layer"],
    ),
    ("model.router.kind=relu", ["budget.experts_per_token=None", "set a number"]),
    ("model.router.kind=seq_top_k", ["budget.experts_per_token=None", "set a number"]),
    ("model.router.kind=seq_top_k budget.experts_per_token=0.5", ["budget.experts_per_token=0.5", "(1 to 16)"]),
    (
        "model.router.kind=seq_top_k model.router.max_experts=2 budget.experts_per_token=3",
        ["budget.experts_per_token=3", "(1 to 2)"],
    ),
    ("model.router.kind=resonance budget.experts_per_token=3", ["budget.experts_per_token=3", "(0 to 2)"]),
    ("model.router.kind=resonance model.router.k=17", ["model.router.k=17", "model.moe.experts (16)"]),
    (
        "model.router.kind=resonance model.hidden=8 model.heads=1 model.kv_heads=1 budget.experts_per_token=2",
        ["model.hidden=8", "use at least model.moe.experts (16)"],
    ),
    (
        "model.router.kind=expert_race budget.experts_per_token=2 model.router.renormalize=true",
        ["model.router.renormalize=True", "expert_race", "remove it"],
    ),
    (
        "model.router.kind=expert_race budget.experts_per_token=2 budget.scope=global",
        ["budget.scope='global'", "holds each layer separately", "use layer"],
    ),
    ("adaptation.interval=10", ["adaptation.interval=10", "model.router.kind=top_any"]),
    (
        "model.router.kind=top_any adaptation.interval=10 adaptation.window=11",
        ["adaptation.window=11", "(10)"],
    ),
    (
        "model.router.kind=top_any adaptation.interval=50 adaptation.window=20 train.steps=10",
        ["adaptation.window=20", "run (10 steps)"],
    ),
    (
        "model.router.kind=top_any adaptation.interval=10 adaptation.policy=released adaptation.removal_share=0.1",
        ["adaptation.removal_share=0.1", "policy=improved"],
    ),
    ("model.moe.max_mean_experts_per_token=0.5", ["model.moe.max_mean_experts_per_token=0.5", "at least 1"]),
    ("model.moe.on_overflow=drop", ["model.moe.on_overflow='drop'", "set model.moe.max_mean_experts_per_token"]),
    (
        "model.router.kind=top_k model.router.k=3 model.moe.max_mean_experts_per_token=2",
        ["model.moe.max_mean_experts_per_token=2.0", "minimum of experts per token (3)"],
    ),
    (
        "model.moe.max_mean_experts_per_token=2 budget.method=pi budget.experts_per_token=2",
        ["model.moe.max_mean_experts_per_token=2.0", "budget of 2", "increase it well above the budget"],
    ),
    (
        "model.moe.max_mean_experts_per_token=3 budget.method=pi budget.experts_per_token=2 budget.start=4 "
        "budget.over_steps=9",
        ["model.moe.max_mean_experts_per_token=3.0", "budget of 4"],
    ),
    ("train.moe_backend=cutlass", ["train.moe_backend='cutlass'", "triton, grouped_mm, loop, sonic"]),
    ("train.moe_backend=mxfp8", ["train.precision='fp32'", "gives results in bf16; use bf16, or another backend"]),
    (
        "train.moe_backend=mxfp8_emulated model.moe.expert_hidden=72",
        ["model.moe.expert_hidden=72", "blocks of 32 of train.moe_backend=mxfp8_emulated", "use a multiple of 32"],
    ),
    ("train.moe_backend=mxfp8 train.precision=bf16 model.hidden=144", ["model.hidden=144", "use a multiple of 32"]),
    ("model.moe.capacity_factor=0", ["model.moe.capacity_factor=0", "above 0"]),
    ("model.moe.expert_hidden=100", ["model.moe.expert_hidden=100", "multiple of 8"]),
    ("model.hidden=100 model.heads=2", ["model.hidden=100", "multiple of 8"]),
    ("model.heads=3", ["model.heads=3", "model.hidden (256)"]),
    ("model.kv_heads=3", ["model.kv_heads=3", "model.heads (4)"]),
    ("parallel.expert=3", ["parallel.expert=3", "model.moe.experts (16)"]),
    ("parallel.expert=2 model.moe.experts=0", ["parallel.expert=2", "dense"]),
    ("parallel.tensor=2", ["parallel.tensor=2", "engine=megatron"]),
    ("parallel.virtual_pipeline=2", ["parallel.virtual_pipeline=2", "engine=megatron"]),
    ("engine=megatron parallel.tensor=4", ["parallel.tensor=4", "model.kv_heads (2)"]),
    ("engine=megatron parallel.tensor=2 data.sequence_length=511", ["parallel.tensor=2", "data.sequence_length (511)"]),
    (
        "engine=megatron parallel.tensor=2 parallel.context=4",
        ["parallel.context=4", "cannot split model.heads (4) evenly into tensor x context (8)"],
    ),
    ("engine=megatron parallel.context=3", ["parallel.context=3", "model.heads (4) evenly into 3"]),
    ("engine=megatron parallel.pipeline=3", ["parallel.pipeline=3", "model.layers (4)"]),
    ("engine=megatron parallel.virtual_pipeline=2", ["parallel.virtual_pipeline=2", "parallel.pipeline"]),
    (
        "engine=megatron parallel.pipeline=2 parallel.virtual_pipeline=4",
        ["parallel.virtual_pipeline=4", "evenly into pipeline x virtual_pipeline (8)"],
    ),
    ("model.full_attention_layers=[1]", ["model.full_attention_layers=[1]", "set model.window"]),
    ("model.window=8 model.full_attention_layers=[4]", ["names layer 4 of 4", "count from 0"]),
    ("model.window=0", ["model.window=0", "at least 1"]),
    ("model.moe.shortcut=true", ["model.moe.shortcut=True", "dense layer behind", "set model.moe.moe_layer_freq=2"]),
    (
        "model.moe.shortcut=true model.moe.moe_layer_freq=2 model.layers=5",
        ["model.layers=5", "behind the last MoE layer", "add one, or remove one"],
    ),
    ("model.moe.shortcut=true model.moe.experts=0", ["model.moe.shortcut=True", "the model is dense"]),
    (
        "engine=megatron parallel.pipeline=2 parallel.virtual_pipeline=2 model.moe.shortcut=true "
        "model.moe.moe_layer_freq=2",
        ["parallel.virtual_pipeline=2", "splits layers 0 and 1", "use fewer stages, or more model.layers"],
    ),
    (
        "engine=megatron parallel.pipeline=2 model.layers=6 model.moe.shortcut=true model.moe.moe_layer_freq=2",
        ["parallel.pipeline=2", "splits layers 2 and 3"],
    ),
    ("model.latent.scale_latents=true", ["model.latent.scale_latents=True", "set model.latent.kv_lora_rank"]),
    ("model.latent.norm_eps=1e-6", ["model.latent.norm_eps=1e-06", "set model.latent.kv_lora_rank"]),
    ("model.latent.q_lora_rank=64", ["model.latent.q_lora_rank=64", "set model.latent.kv_lora_rank"]),
    ("model.latent.v_head_dim=64", ["model.latent.v_head_dim=64", "set model.latent.kv_lora_rank"]),
    ("model.latent.kv_lora_rank=64", ["model.kv_heads=2", "use model.heads (4)"]),
    (
        "model.latent.kv_lora_rank=64 model.kv_heads=4 model.latent.qk_rope_head_dim=7",
        ["model.latent.qk_rope_head_dim=7", "use an even number"],
    ),
    (
        "model.latent.kv_lora_rank=64 model.kv_heads=4 model.latent.v_head_dim=193",
        ["model.latent.v_head_dim=193", "width of a key", "(192)"],
    ),
    (
        "engine=megatron parallel.tensor=2 model.kv_heads=4 model.latent.kv_lora_rank=63",
        ["parallel.tensor=2", "model.latent.kv_lora_rank + qk_rope_head_dim (127)"],
    ),
    ("model.latent.kv_lora_rank=64 model.kv_heads=4 model.head_dim=64", ["model.head_dim=64", "from model.latent"]),
    ("model.latent.kv_lora_rank=64 model.kv_heads=4 model.qk_norm=head", ["model.qk_norm='head'", "remove it"]),
    (
        "model.latent.kv_lora_rank=64 model.kv_heads=4 model.attention_bias=qkv",
        ["model.attention_bias='qkv'", "latent attention has no biases"],
    ),
    ("model.rope_scaling.factor=2", ["model.rope_scaling.factor=2", "set model.rope_scaling.kind"]),
    ("model.rope_scaling.kind=yarn", ["model.rope_scaling.original_length=None", "yarn needs it"]),
    (
        "model.rope_scaling.kind=llama3 model.rope_scaling.original_length=64 model.rope_scaling.low_freq_factor=4",
        ["model.rope_scaling.low_freq_factor=4", "high_freq_factor"],
    ),
    ("model.rope_scaling.kind=dynamic", ["model.rope_scaling.kind='dynamic'", "linear, yarn, llama3"]),
    ("engine=megatron parallel.context=8", ["parallel.context=8", "model.heads (4)", "8"]),
    (
        "engine=megatron parallel.context=4 data.sequence_length=510",
        ["parallel.context=4", "data.sequence_length (510)"],
    ),
    (
        "data.documents=joined data.predict_first_token=false",
        ["data.predict_first_token=False", "data.documents=masked"],
    ),
    ("train.recompute=true", ["train.recompute", "selective"]),
    ("deepspeed.zero_stage=4", ["deepspeed.zero_stage=4", "at most 3"]),
    (
        "optimizer.kind=muon deepspeed.zero_stage=3",
        ["deepspeed.zero_stage=3", "use 0, 1 or 2, or optimizer.kind=adamw"],
    ),
    ("engine=fsdp", ["engine='fsdp'", "deepspeed, megatron"]),
    ("data.dirs=[]", ["data.dirs=[]", "has no corpus"]),
    ("data.weights=[1,2]", ["data.weights=[1.0, 2.0]", "data.dirs"]),
    ("data.dirs=data/mine", ["data.dirs", "'data/mine' is not a list", "in brackets: [data/mine]"]),
    ("model.full_attention_layers=0", ["model.full_attention_layers", "in brackets: [0]"]),
    ("data.dirs=[[a]]", ["data.dirs", "list"]),
    ("data.dirs=[{a: b}]", ["data.dirs.a", "no such field"]),
    ('data.dirs=["a\\nb"]', ["data.dirs='a\\nb'", "unprintable"]),
    ("run.name=../escape", ["run.name='../escape'", "letters, digits"]),
    ("run.name=a\nb", ["run.name", "letters, digits"]),
    (f"run.name={'a' * 241}", ["run.name", "241 characters", "at most 240"]),
    ("run.name=${oc.env:HOME}", ["run.name", "interpolation"]),
    ("model=3", ["model"]),
    ("model.router=[]", ["model.router"]),
    ("train.steps=???", ["train.steps", "???"]),
    ("data.dirs.0=x", ["data.dirs"]),
    ("optimizer.beta2=1", ["optimizer.beta2=1", "below 1"]),
    ("model.layers=1000000000000", ["model.layers=1000000000000", "at most 10000"]),
    (f"train.steps={'9' * 400}", ["train.steps=999", "64 bits"]),
    (f"train.steps={'9' * 5000}", ["train.steps in the command line", "Integer"]),
    ("train.steps=1:30", ["train.steps", "'1:30'", "Integer"]),  # YAML 1.1: a number to base 60
    ("train.steps='not in'", ["train.steps in the command line", "Integer"]),
    ("eval.domains=7", ["eval.domains", "'7'", "not a boolean"]),
    ("eval.domains=2.5", ["eval.domains", "'2.5'", "not a boolean"]),
    ("data.verify=twice", ["data.verify='twice'", "once, always, never"]),
    ("a\nb=1", ["'a\\nb'", "no such field"]),
    ("run.name.x=1", ["run.name.x", "did you mean run.name?"]),
    (f"{'a.' * 5000}b=1", ["no such field"]),
    (f"train.steps={'[' * 5000}", ["nested too deeply"]),
    ('run.dir="\\0"', ["run.dir='\\x00'", "unprintable"]),
    ('run.dir="\\ud800"', ["run.dir='\\ud800'", "unprintable"]),
    ("run.dir=/tmp/\x1b[2J", ["run.dir", "not allowed"]),
    ('train.steps="\\e[2J"', ["train.steps", "\\x1b", "Integer"]),
    ("train.seed=4294967296", ["train.seed=4294967296", "below 4294967296"]),
    ("train.steps", ["'train.steps'", "key=value"]),
    ("logging.wandb=off", ["logging.wandb", "disabled, offline, online"]),
    ("logging.wandb=online logging.wandb_project=team/x", ["logging.wandb_project='team/x'", "1 to 128 characters"]),
]


@pytest.mark.parametrize(("typed", "named"), BAD, ids=[typed[:80] for typed, _ in BAD])
def test_f25_invalid_override_is_refused_in_one_line_with_field_value_and_fix(typed, named):
    overrides = re.split(r" (?=[a-z_.]+=)", typed)
    with pytest.raises(UserError) as caught:
        load_config(None, overrides)
    message = str(caught.value)
    assert message.isprintable()
    for part in named:
        assert part in message, message


QUANTILE = ["model.router.kind=quantile", "budget.experts_per_token=2"]


@pytest.mark.parametrize(
    ("overrides", "world_size", "named"),
    [
        (["parallel.expert=2"], 3, ["parallel.expert=2", "world size (3)"]),
        (["train.global_batch=12", "train.micro_batch=8"], 1, ["train.global_batch=12", "(8)"]),
        (["train.global_batch=16", "train.micro_batch=8"], 4, ["train.global_batch=16", "(32)"]),
        (["engine=megatron", "parallel.tensor=2"], 3, ["parallel.tensor=2", "world size (3)"]),
        (["engine=megatron", "parallel.context=2"], 3, ["parallel.context=2", "world size (3)"]),
        (["engine=megatron", "parallel.pipeline=2", "parallel.expert=4"], 4, ["parallel.expert=4", "stage (2)"]),
        (
            ["engine=megatron", "parallel.pipeline=2", "parallel.virtual_pipeline=2", "train.micro_batch=16"],
            2,
            ["train.global_batch=16", "multiple of 32"],
        ),
        (
            [*QUANTILE, "data.sequence_length=64", "parallel.expert=2", "train.micro_batch=1"],
            2,
            [
                "model.router.bins=1024",
                "128 tokens of a forward pass over all ranks",
                "at most 128",
                "train.micro_batch",
            ],
        ),
        (
            [*QUANTILE, "data.sequence_length=32", "model.router.thresholds=running"],
            1,
            ["model.router.bins=1024", "512 tokens of a step", "at most 512", "train.global_batch"],
        ),
        (
            [*QUANTILE, "data.sequence_length=2", "model.router.bins=16", "train.micro_batch=4"],
            1,
            ["model.router.bins=16", "8 tokens of a forward pass", "; increase train.micro_batch"],
        ),
    ],
)
def test_f25_layout_that_does_not_fit_the_world_size_is_refused(overrides, world_size, named):
    with pytest.raises(UserError) as caught:
        load_config(None, overrides).check_world(world_size)
    for part in named:
        assert part in str(caught.value)


def test_overrides_win_over_the_file_and_the_file_over_the_defaults(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("train:\n  steps: 7\n  seed: 3\nmodel:\n  router: {kind: top_k, k: 4}\n")
    config = load_config(path, ["train.steps=9"])
    assert (config.train.steps, config.train.seed, config.train.micro_batch) == (9, 3, Config().train.micro_batch)
    assert (config.model.router.kind, config.model.router.k) == ("top_k", 4)


# Files that are not valid configurations, including malicious ones.
LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 60))


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("- a\n- b\n", "must be a mapping"),
        ("train: {steps: 3\n", "is not YAML"),
        ("train: {stepps: 3}\n", "train.stepps"),
        ("train: !!python/object/apply:os.system ['touch executed']\n", "is not YAML: could not determine"),
        ("train: !!python/name:os.system\n", "is not YAML: could not determine"),
        ("train: {!!merge m: {steps: 3}}\n", "is not YAML: could not determine"),
        ("run: {name: !!binary aGk=}\n", "is not YAML: could not determine"),
        ("run: {name: '${oc.env:DYNMOE_MARKER}'}\n", "interpolation"),
        ("run: {name: '${oc.decode:${oc.env:DYNMOE_MARKER}}'}\n", "interpolation"),
        ("data: {dirs: ['${oc.env:DYNMOE_MARKER}']}\n", "interpolation"),
        ("${oc.env:DYNMOE_MARKER}: 1\n", "no such field"),
        (LAUGHS, "aliases are not supported .line 2"),
        ("train: &x\n  steps: *x\n", "aliases are not supported .line 2"),
        ("train: {steps: 3, steps: 4}\n", "'steps' occurs twice"),
        ("train: {steps: 3}\nrun: {name: a}\ntrain: {seed: 4}\n", "'train' occurs twice"),
        ("[" * 10**5, "nested too deeply"),
        ("train: " + "{a: " * 10**4, "nested too deeply"),
        ("\n".join(" " * n + "a:" for n in range(400)), "nested too deeply .line 16"),
        ("train: {steps: 3}\n---\ntrain: {steps: 4}\n", "another document"),
        ("? [train]\n: 1\n", "unhashable"),
        ("null: 1\n", "None in .*: no such field"),
        ('"a\\nb": 1\n', "no such field"),
        ('run: {name: "\\Uffffffff"}\n', "is not YAML"),
        ("train: {steps: \0}\n", "is not YAML"),
        (b"\xff\xfe\x00", "is not YAML"),
        (b"train: {steps: \xe9}", "is not YAML"),
    ],
)  # fmt: skip
def test_f25_invalid_file_is_refused_in_one_line(tmp_path, monkeypatch, content, named):
    monkeypatch.setenv("DYNMOE_MARKER", "known to the environment alone")
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    started = time.monotonic()
    with pytest.raises(UserError, match=named) as caught:
        load_config(path)
    assert time.monotonic() - started < 5
    assert str(caught.value).isprintable()
    assert "known to" not in str(caught.value)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", ["", "{}\n", "# nothing yet\n", "---\n"])
def test_empty_file_gives_the_defaults(tmp_path, content):
    path = tmp_path / "a.yaml"
    path.write_text(content)
    assert load_config(path, []) == load_config(None, [])


@pytest.mark.parametrize(
    ("typed", "field", "meant"),
    [
        ("run.name=1.10", "run.name", "1.10"),
        ("run.name=010", "run.name", "010"),
        ("run.name=1e3", "run.name", "1e3"),
        ("run.name=true", "run.name", "true"),
        ("run.name=2024-01-01", "run.name", "2024-01-01"),
        ("run.name='null'", "run.name", "null"),
        ("data.dirs=[1.10, on, 'a, b']", "data.dirs", ["1.10", "on", "a, b"]),
        ("train.steps=010", "train.steps", 10),
        ("train.steps=1_000", "train.steps", 1000),
        ("optimizer.lr=1e-3", "optimizer.lr", 1e-3),
        ("eval.domains=no", "eval.domains", False),
        ("data.verify=no", "data.verify", "never"),  # as older runs have it
        ("data={verify: True}", "data.verify", "once"),
        ("logging.tensorboard=1", "logging.tensorboard", True),
        ("model.vocab_size=~", "model.vocab_size", None),
        ("run={name: a.b, dir: c d}", "run.dir", "c d"),
    ],
)
def test_f25_accepted_value_has_the_type_and_meaning_of_its_field(typed, field, meant):
    value = attrgetter(field)(load_config(None, [typed]))
    assert (value, type(value)) == (meant, type(meant))


def test_f25_mistake_is_reported_before_torch_is_imported():
    code = (
        "import runpy, sys\n"
        "try: runpy.run_path('train.py', run_name='__main__')\n"
        "finally: print('torch' in sys.modules)"
    )
    for world_size, mistake in (("1", "run.name=../escape"), ("3", "parallel.expert=2")):
        failed = subprocess.run(
            [sys.executable, "-c", code, mistake], capture_output=True, text=True, check=False, cwd=ROOT,
            env={**os.environ, "WORLD_SIZE": world_size},
        )  # fmt: skip
        assert (failed.returncode, failed.stdout) == (2, "False\n")
        assert failed.stderr.startswith(f"error: {mistake.partition('=')[0]}=")
        assert failed.stderr.count("\n") == 1


def test_missing_file_is_refused_by_name():
    with pytest.raises(UserError, match=r"nowhere\.yaml cannot be read"):
        load_config("nowhere.yaml")


def test_printed_configuration_loads_as_the_same_configuration(tmp_path):
    config = load_config(None, ["model.router.kind=top_any", "data.weights=[2.5]", "model.moe.capacity_factor=1.25"])
    path = tmp_path / "run.yaml"
    path.write_text(config.to_yaml())
    assert load_config(path) == config


def test_default_loss_coefficients_are_those_of_the_papers():
    def coefficients(*overrides: str) -> dict[str, float]:
        return load_config(None, overrides).model.router.loss_coefficients()

    assert coefficients() == {"balance": 1e-2, "entropy": 1e-4}
    assert coefficients("model.router.balance_loss=0") == {"entropy": 1e-4}
    assert coefficients("model.router.kind=top_k", "model.router.z_loss=1e-3") == {"balance": 1e-2, "z": 1e-3}
    assert set(coefficients("model.router.kind=top_any", "model.router.variant=released")) == {
        "balance", "diversity", "simplicity", "efficiency",
    }  # fmt: skip


def test_a_form_sets_the_defaults_of_router_options():
    def options(*overrides: str):
        return load_config(None, overrides).model.router.resolved

    kind = "model.router.kind=top_any"
    paper, released, improved = (
        options(kind, f"model.router.variant={form}") for form in ("paper", "released", "improved")
    )
    assert (paper.straight_through, paper.min_experts, paper.temperature) == ("all", 1, "fixed")
    assert (released.straight_through, released.min_experts, released.weights) == ("selected", 0, "uniform")
    assert (improved.weights, improved.renormalize, improved.temperature) == ("score", True, "sqrt_hidden")
    given = options(kind, "model.router.variant=improved", "model.router.weights=uniform")
    assert (given.weights, given.temperature) == ("uniform", "sqrt_hidden")
    assert options("model.router.kind=top_k").balance_per_route
    assert not options().balance_per_route
    assert not options("model.router.kind=null_experts", "model.router.renormalize=false").renormalize


def test_every_field_has_a_meaning():
    described = list(describe_fields())
    assert len(described) > 50
    assert all(meaning and kind for _, kind, _, meaning in described)


def run_train(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "train.py", *arguments], capture_output=True, text=True, check=False, cwd=ROOT
    )


def test_help_lists_every_field_and_print_config_prints_what_load_config_gives():
    text = run_train("--help").stdout
    assert all(f"  {name} " in text and f"default {default})" in text for name, _, default, _ in describe_fields())
    printed = run_train("configs/quickstart.yaml", "train.steps=3", "--print-config", "eval.batches=1")
    assert (
        printed.stdout == load_config(ROOT / "configs/quickstart.yaml", ["train.steps=3", "eval.batches=1"]).to_yaml()
    )


def test_f25_mistake_on_the_command_line_prints_one_line_without_traceback():
    failed = run_train("model.router.p=2")
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr == "error: model.router.p=2.0: is too large; use a value of at most 1\n"


def test_importing_the_configuration_does_not_import_torch():
    code = "import dynmoe.config, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


OLD_NAME = "guard.bad_steps"
NEW_NAME = "guard.max_consecutive_nonfinite_steps"


def load_with_old_name(source: str, *arguments) -> Config:
    """Calls ``load_config`` and checks that it gives exactly one warning, about the old name."""
    with pytest.warns(FutureWarning) as caught:
        config = load_config(*arguments)
    (warning,) = caught
    assert str(warning.message) == (
        f"{OLD_NAME} is now called {NEW_NAME}; rename it, as the next release no longer accepts the former name"
    )
    assert warning.filename == source
    return config


def test_old_field_name_in_a_file_sets_the_new_field_with_a_warning(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("guard: {bad_steps: 5, spike_window: 8}\ntrain: {steps: 7}\n")
    config = load_with_old_name(str(path), path)
    assert config.guard == GuardConfig(max_consecutive_nonfinite_steps=5, spike_window=8)
    assert config.train.steps == 7


@pytest.mark.parametrize("override", ["guard.bad_steps=5", "guard={bad_steps: 5}"])
def test_old_field_name_in_an_override_sets_the_new_field_with_a_warning(override):
    config = load_with_old_name("the command line", None, [override])
    assert config.guard == GuardConfig(max_consecutive_nonfinite_steps=5)


def test_new_field_name_in_an_override_wins_over_the_old_name_in_a_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("guard: {bad_steps: 5}\n")
    assert load_with_old_name(str(path), path, [f"{NEW_NAME}=6"]).guard.max_consecutive_nonfinite_steps == 6


@pytest.mark.parametrize("overrides", [["guard.bad_steps=5", f"{NEW_NAME}=5"], [f"{NEW_NAME}=5", "guard.bad_steps=5"]])
def test_both_names_of_a_field_in_one_source_are_refused(tmp_path, overrides):
    both = rf"{OLD_NAME} in .*: is the former name of {NEW_NAME}, which is also given; remove {OLD_NAME}"
    with pytest.raises(UserError, match=both):
        load_config(None, overrides)
    path = tmp_path / "run.yaml"
    path.write_text("guard: {bad_steps: 5, max_consecutive_nonfinite_steps: 5}\n")
    with pytest.raises(UserError, match=both):
        load_config(path)


def test_wrong_value_under_an_old_name_is_refused_under_the_new_name():
    with pytest.warns(FutureWarning), pytest.raises(UserError, match=rf"{NEW_NAME}=0: is too small"):
        load_config(None, ["guard.bad_steps=0"])


def test_only_rank_0_warns_about_an_old_name(monkeypatch, recwarn):
    monkeypatch.setenv("RANK", "1")
    assert load_config(None, ["guard.bad_steps=5"]).guard.max_consecutive_nonfinite_steps == 5
    assert not recwarn.list


def test_old_name_warning_is_one_line_of_output_and_help_does_not_list_old_names():
    printed = run_train("guard.bad_steps=5", "--print-config")
    assert f"{NEW_NAME.partition('.')[2]}: 5" in printed.stdout
    assert printed.stderr.count("\n") == 1
    assert "bad_steps" not in printed.stdout
    assert all(name != OLD_NAME for name, *_ in describe_fields())


def test_a_field_can_move_to_another_section(monkeypatch):
    monkeypatch.setattr(load, "_RENAMED", {"old.part.name": "model.router.p"})
    with pytest.warns(FutureWarning, match=r"old\.part\.name is now called model\.router\.p"):
        assert load_config(None, ["old.part.name=0.25", "train.steps=3"]).model.router.p == 0.25


OLDER = {
    "top_k": ["model.router.z_loss=0.001", "budget.method=loss_free"],
    "top_p": [
        "model.router.variant=improved", "model.router.balance_scope=sequence",
        "model.moe.max_mean_experts_per_token=3", "model.moe.on_overflow=drop",
    ],
    "relu": ["budget.experts_per_token=2", "budget.scope=global"],
}  # fmt: skip


@pytest.mark.parametrize("kind", OLDER)
def test_configuration_of_an_older_run_loads_with_the_fields_of_all_routers(kind):
    path = Path(__file__).parents[1] / "golden" / f"older_config_{kind}.yaml"
    with pytest.warns(FutureWarning, match=r"model\.router\.form is now called model\.router\.variant"):
        config = load_config(path)
    expected = load_config(None, [f"model.router.kind={kind}", *OLDER[kind]])
    assert config.model.router == expected.model.router
    assert config.budget == expected.budget
    moe = (config.model.moe.max_mean_experts_per_token, config.model.moe.on_overflow)
    assert moe == (expected.model.moe.max_mean_experts_per_token, expected.model.moe.on_overflow)
    saved = yaml.safe_load(path.read_text())
    assert saved["model"]["router"]["cutoff"] == 0.5
    kept = with_kept_fields(config, saved)
    assert kept.data.documents == "joined"
    check_unchanged(saved, dataclasses.asdict(kept))
    other = saved["model"]["router"]["kind"] = "null_experts" if kind == "top_k" else "top_k"
    with pytest.raises(ConfigError, match=rf"model\.router\.kind='{kind}': the run's checkpoint has '{other}'"):
        check_unchanged(saved, dataclasses.asdict(config))


def test_a_gate_needs_a_shared_expert():
    with pytest.raises(ConfigError, match=r"^model.moe.shared_gate=True: has no shared expert; set model.moe.shared_h"):
        load_config(None, ["model.moe.shared_gate=true"])


def test_a_run_keeps_its_optimizer():
    """The moments of one mean nothing to the other, although Megatron's checkpoints would fit."""
    muon = load_config(None, ["optimizer.kind=muon", "checkpoint.accept_changes=[optimizer.kind]"])
    saved = dataclasses.asdict(load_config(None, []))
    with pytest.raises(
        ConfigError, match=r"optimizer\.kind='muon': the run's checkpoint has 'adamw'; keep it, or start"
    ):
        check_unchanged(saved, dataclasses.asdict(muon))
    check_unchanged(saved, dataclasses.asdict(muon), has_begun=False)
    del saved["optimizer"]["kind"]  # a run from before the field
    check_unchanged(saved, dataclasses.asdict(load_config(None, [])))


def test_a_quantile_needs_as_many_tokens_as_bins():
    """128 tokens on each of 8 ranks are enough in a pass; 1,024 tokens of a step are, whatever a pass has."""
    fields = [*QUANTILE, "data.sequence_length=128", "train.micro_batch=1"]
    load_config(None, fields).check_world(8)
    with pytest.raises(UserError, match=r"bins=1024: exceeds the 512 tokens"):
        load_config(None, fields).check_world(4)
    load_config(None, [*fields, "train.global_batch=8", "model.router.thresholds=running"]).check_world(1)
