"""Plans: their sums, their memory compared with measured runs, and the project's configurations."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dynmoe.__main__ import console_script
from dynmoe.cli import EXIT_USER_ERROR
from dynmoe.config import load_config
from dynmoe.model import Decoder
from dynmoe.model.matrices import matrices_of_layer, rows_of_matrices
from dynmoe.plan.activations import ranks_per_token, ranks_reached
from dynmoe.plan.layout import Layout
from dynmoe.plan.memory import memory_per_rank
from dynmoe.plan.search import alternatives, expected_experts, most_experts, plan
from dynmoe.plan.speed import Hardware, estimate
from dynmoe.train.muon import orthogonalization_flops, orthogonalize
from harness.processes import CPU, ROOT

CONFIGS = sorted(path for path in (ROOT / "configs").glob("*.yaml") if path.stem != "quickstart")
LARGEST = ("deepseek_v3_64x8", "longcat_64x8")
_TINY = [
    "data.sequence_length=256", "train.micro_batch=1", "model.vocab_size=4096", "model.hidden=512", "model.layers=4",
    "model.heads=8", "model.kv_heads=4", "model.moe.experts=8", "model.moe.expert_hidden=1024",
    "model.router.kind=top_k", "model.router.k=2",
]  # fmt: skip


def layout(ranks: int, *fields: str, nodes: int = 1) -> Layout:
    config = load_config(None, [*_TINY, *fields])
    assert config.model.vocab_size is not None
    return Layout(config, nodes, ranks // nodes, config.model.vocab_size)


def described(path: Path) -> tuple[int, int]:
    """Nodes and GPUs per node, as stated at the top of a configuration."""
    found = re.search(rf"python -m dynmoe\.plan configs/{path.name} --nodes (\d+) --gpus (\d+)", path.read_text())
    assert found, f"{path} does not state its cluster"
    return int(found[1]), int(found[2])


@pytest.mark.parametrize("path", [
    pytest.param(path, id=path.stem, marks=pytest.mark.slow if path.stem in LARGEST else ()) for path in CONFIGS
])  # fmt: skip
def test_every_configuration_has_the_size_that_it_states(path, summary):
    """Also, it fits the GPUs that it names at the maximum number of experts per token."""
    config = load_config(path)
    nodes, gpus = described(path)
    rows = config.model.vocab_size
    own = Layout(config, nodes, gpus, rows)
    config.check_world(own.world_size)
    with torch.device("meta"):
        model = Decoder(config.model, rows, 0, recompute=config.train.recompute)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert parameters == own.size.total_parameters
    stated = re.search(r"([\d.]+) B parameters", path.read_text())
    assert float(stated[1]) == pytest.approx(parameters / 1e9, rel=0.06)
    tokens = re.search(r"([\d.,]+) B tokens", path.read_text())
    trained = config.train.steps * config.tokens_per_step / 1e9
    assert float(tokens[1].replace(",", "")) == pytest.approx(trained, rel=0.03)
    held = expected_experts(config) or 2.0
    one = plan(own, held, Hardware())
    assert one.fits(Hardware()), f"{one.largest.total / 2**30:.1f} GiB"
    summary.append(
        f"{path.stem}: {parameters / 1e9:.2f} B parameters, {own.size.active_parameters(held) / 1e9:.2f} B active at "
        f"{held:g}, {one.expected.total / 2**30:.1f} GiB a rank of {nodes} x {gpus} (at {most_experts(config):g}: "
        f"{one.largest.total / 2**30:.1f}), {own.size.static_flops(1, held) / 1e9:.2f} GFLOPs a token"
    )


def test_ranks_per_token_equal_an_enumeration():
    for experts, ranks, chosen in [(8, 4, 1), (8, 4, 2), (8, 2, 3), (6, 3, 4), (6, 6, 6)]:
        per_rank = experts // ranks
        sets = list(itertools.combinations(range(experts), chosen))
        counted = sum(len({expert // per_rank for expert in one}) for one in sets) / len(sets)
        assert ranks_per_token(chosen, experts, ranks) == pytest.approx(counted)
    assert ranks_per_token(1.5, 8, 4) == pytest.approx((1 + ranks_per_token(2, 8, 4)) / 2)


@pytest.mark.parametrize("fields", [
    [], ["parallel.expert=4"], ["engine=megatron", "parallel.pipeline=2", "parallel.expert=2"],
    ["engine=megatron", "parallel.tensor=2", "model.moe.moe_layer_freq=2"],
    ["engine=megatron", "parallel.pipeline=2", "model.moe.moe_layer_freq=2", "model.moe.shortcut=true"],
    ["engine=megatron", "parallel.pipeline=2", "model.moe.first_k_dense_replace=3", "model.moe.shared_hidden=64",
     "model.moe.shared_gate=true"],
    ["model.mtp.layers=2"],
    ["engine=megatron", "parallel.pipeline=2", "model.mtp.layers=1", "model.moe.moe_layer_freq=3"],
])  # fmt: skip
def test_the_ranks_together_hold_the_whole_model(fields):
    own = layout(8, *fields, "train.global_batch=32")
    parallel = own.config.parallel
    stages = range(parallel.pipeline)
    experts = sum(own.expert_parameters(stage) for stage in stages) * parallel.expert
    mtp = own.config.model.mtp.layers
    moe = [layer for layer in range(4 + mtp) if own.config.model.is_moe_layer(layer)]
    assert experts == len(moe) * 8 * 3 * 512 * 1024
    dense = sum(own.dense_parameters(stage) for stage in stages)
    if parallel.tensor == 1:  # the last of several stages has another embedding if it predicts further tokens
        copy = 4096 * 512 if mtp and parallel.pipeline > 1 else 0
        assert dense + experts == own.size.total_parameters + copy
    else:
        assert dense < own.size.total_parameters - experts < 2 * dense


def test_a_shortcut_adds_dense_layers_and_their_traffic():
    """As much as in a model with dense layers alone, where a tensor-parallel rank sends the same for each."""
    fields = ["engine=megatron", "parallel.tensor=2", "train.global_batch=32", "model.moe.moe_layer_freq=2"]
    without, both, dense = (
        layout(8, *fields, *extra) for extra in ([], ["model.moe.shortcut=true"], ["model.moe.experts=0"])
    )
    assert both.size.total_parameters - without.size.total_parameters == 2 * 3 * 512 * 1024
    sent = [estimate(own, 2.0, Hardware()).traffic["tensor parallelism"].inside for own in (both, dense)]
    assert sent[0] == sent[1] > 0
    kept = [memory_per_rank(own, 2.0, "cpu").activations for own in (without, both)]
    assert kept[1] - kept[0] == 2 * (256 // 2) * 4 * 1024 * 4


def test_ranks_reached_within_groups_equal_an_enumeration():
    """A token takes three of eight experts, uniformly within two of four groups; each group is on one or two ranks."""
    fields = ["model.router.kind=top_k", "model.router.k=3", "model.router.n_group=4", "model.router.topk_group=2"]
    model = layout(8, *fields, "parallel.expert=4", "train.global_batch=32").config.model
    sets = list(itertools.combinations(range(4), 3))  # of the experts of two groups
    for ranks, per_rank in ((4, 2), (8, 1)):
        counted = sum(len({expert // per_rank for expert in one}) for one in sets) / len(sets)
        assert ranks_reached(model, 0, 3, ranks) == pytest.approx(counted)
    assert ranks_reached(model, 0, 3, 2) == ranks_per_token(3, 8, 2)  # two groups on each rank


def test_a_pipeline_waits_for_the_stage_with_experts():
    fields = ["engine=megatron", "parallel.pipeline=2", "parallel.expert=4", "train.global_batch=64"]
    plain, dense_first = (
        estimate(layout(8, *fields, *extra), 2.0, Hardware()) for extra in ([], ["model.moe.first_k_dense_replace=2"])
    )
    assert dense_first.traffic["tokens to experts"] == plain.traffic["tokens to experts"]
    reduced = [speed.traffic["gradients and weights"].inside for speed in (plain, dense_first)]
    assert reduced[1] == pytest.approx(reduced[0], rel=1e-3)  # also the final norm


def test_traffic_follows_the_links():
    hardware = Hardware()
    inside = estimate(layout(16, "parallel.expert=8", "train.global_batch=16", nodes=2), 2.0, hardware).traffic
    across = estimate(layout(16, "parallel.expert=8", "train.global_batch=16", nodes=4), 2.0, hardware).traffic
    tokens = "tokens to experts"
    assert inside[tokens].between == 0 < inside[tokens].inside
    assert across[tokens].between == pytest.approx(4 / 7 * inside[tokens].inside)
    assert estimate(layout(1), 2.0, hardware).traffic_s == 0
    # Of each of 64 tokens of 16 sequences in 4 layers, three other ranks get a quarter of the heads: 8 queries and
    # outputs, 4 keys and values, 64 numbers each, and their gradients.
    heads = estimate(layout(4, "engine=megatron", "parallel.context=4", "train.global_batch=16"), 2.0, hardware).traffic
    assert heads["context parallelism"].inside == 64 * 16 * 4 * 3 / 4 * 2 * (8 + 4) * 64 * 4 * 2
    one_pass = layout(8, "deepspeed.zero_stage=2", "train.global_batch=8")
    four = layout(8, "deepspeed.zero_stage=2", "train.global_batch=32")
    reduced = [estimate(own, 2.0, hardware).traffic["gradients and weights"].inside for own in (one_pass, four)]
    assert reduced[1] == pytest.approx(2.5 * reduced[0])  # gradients of each micro-batch, weights once


def test_other_layouts_fit_and_are_sorted():
    own = layout(8, "train.global_batch=64", "train.precision=bf16")
    small = Hardware(memory_gib=0.8)
    found = alternatives(own, 2.0, small)
    assert 0 < len(found) < len(alternatives(own, 2.0, Hardware()))
    assert all(one.fits(small) for one in found)
    speeds = [one.speed.tokens_per_s for one in found]
    assert all(later < 1.02 * earlier for earlier, later in itertools.pairwise(speeds))
    assert len({one.layout.config.parallel.expert for one in found}) > 1


def test_more_experts_per_token_need_more_memory():
    own = layout(8, "train.micro_batch=8", "train.global_batch=64", "parallel.expert=4")
    few, many = (memory_per_rank(own, experts, "cpu") for experts in (1.0, 8.0))
    assert many.activations - few.activations > 4 * 7 * 8 * 256 * 2 * 1024 * 4
    assert (few.parameters, few.gradients, few.optimizer) == (many.parameters, many.gradients, many.optimizer)


def test_the_command_prints_plans_and_errors(monkeypatch, capsys):
    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dynmoe", "plan", *arguments])
        status = 0
        try:
            console_script()
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    one_node = str(ROOT / "configs/one_node.yaml")
    status, printed, _ = run(one_node, "--nodes", "1", "--gpus", "8", "--layouts", "3")
    assert status == 0
    for part in ("2.93 B parameters", "memory per rank:", "at 4 experts per token", "tokens to experts:", "tokens/s"):
        assert part in printed
    assert len(printed[printed.index("Layouts that fit") :].splitlines()) == 5
    status, printed, problem = run(one_node, "--nodes", "1", "--gpus", "6")
    assert "configured layout is invalid: parallel.expert=8: must divide the world size (6)" in printed
    assert status == EXIT_USER_ERROR
    assert problem.startswith("error: train.global_batch=256: cannot be split evenly over")
    odd = ["engine=megatron", "parallel.tensor=3", "parallel.expert=2", "model.heads=12", "model.kv_heads=12",
           "model.head_dim=128", "data.sequence_length=3072", "model.ffn_hidden=1536", "model.moe.expert_hidden=3072",
           "model.vocab_size=32256"]  # fmt: skip
    status, printed, problem = run(one_node, *odd, "--nodes", "1", "--gpus", "6")
    assert (status, problem) == (0, "")
    assert "configured layout is invalid" not in printed
    status, _, problem = run(one_node, "--memory-gib", "2")
    assert status == EXIT_USER_ERROR
    assert problem == "error: no layout of 8 GPUs fits 2 GiB; use more GPUs\n"
    assert "model.vocab_size=None" in run(str(ROOT / "configs/quickstart.yaml"))[2]
    for option in ("--efficiency 0.0", "--experts-per-token -1.0", "--vocab-size 0", "--layouts 0"):
        assert f"error: {option}: must be above 0" in run(one_node, *option.split())[2]


def test_groups_of_odd_sizes_cross_nodes_too():
    own = layout(12, "parallel.expert=4", "train.global_batch=12", "model.moe.experts=8", nodes=2)
    assert estimate(own, 2.0, Hardware()).traffic["gradients and weights"].between > 0


def test_experts_in_mxfp8_need_a_temporary_copy_of_the_up_projections():
    """In bf16, scaled, and in bytes: three bytes for each of two thirds of the weights of one layer."""
    many = ["train.precision=bf16", "train.micro_batch=64", "train.global_batch=64"]
    plain, mxfp8 = (memory_per_rank(layout(1, *many, f"train.moe_backend={name}"), 2.0) for name in ("auto", "mxfp8"))
    assert mxfp8.temporary - plain.temporary == pytest.approx(3 * 2 / 3 * 8 * 3 * 512 * 1024)
    assert mxfp8.total - plain.total == pytest.approx(mxfp8.temporary - plain.temporary)


def test_zero_3_holds_the_embeddings_for_a_whole_pass():
    """DeepSpeed gathers what a module itself has, and gives it back after the module: here, after the model."""
    fields = ["deepspeed.zero_stage=3", "model.layers=16", "train.precision=bf16", "train.recompute=full"]

    def temporary(rows: int, *more: str) -> float:
        return memory_per_rank(Layout(load_config(None, [*_TINY, *fields, *more]), 1, 8, rows), 2.0).temporary

    more = 2**19
    assert temporary(4096 + more) - temporary(4096) == pytest.approx(2 * more * 512 * 2)
    tied = "model.tie_embeddings=true"
    assert temporary(4096 + more, tied) - temporary(4096, tied) == pytest.approx(more * 512 * 2)


def test_pipeline_stages_store_activations_in_flight():
    fields = ["engine=megatron", "train.recompute=full", "train.global_batch=32", "train.micro_batch=4"]
    one, four = (
        memory_per_rank(layout(4, *fields, f"parallel.pipeline={stages}"), 2.0, "cpu").activations for stages in (1, 4)
    )
    tokens = 4 * 256
    # The first stage stores its layer's input for four micro-batches, and one recomputed layer; the head is on the last
    # stage.
    assert four < one + 4 * tokens * 512 * 4
    interleaved = layout(4, *fields[:1], *fields[2:], "parallel.pipeline=2", "parallel.virtual_pipeline=2")
    plain = layout(4, *fields[:1], *fields[2:], "parallel.pipeline=2")
    assert memory_per_rank(interleaved, 2.0).activations > memory_per_rank(plain, 2.0).activations


_LATENT = ["model.kv_heads=8", *(f"model.latent.{field}" for field in (
    "kv_lora_rank=128", "q_lora_rank=192", "qk_nope_head_dim=64", "qk_rope_head_dim=32", "v_head_dim=64",
))]  # fmt: skip
_LONGCAT = [*_LATENT, "model.latent.scale_latents=true", "model.moe.moe_layer_freq=2", "model.moe.shortcut=true"]
_PLAIN = str.maketrans(dict.fromkeys("[]' "))
# Ranks and fields: both engines, ZeRO stages, precisions, accumulation, recomputation and parallelism; some have more
# activations than parameters.
MEASURED = [
    (1, ["deepspeed.zero_stage=0", "train.micro_batch=16"]),
    (2, ["deepspeed.zero_stage=1", "parallel.expert=2", "train.micro_batch=8"]),
    (2, ["deepspeed.zero_stage=1", "train.precision=bf16"]),
    (2, ["deepspeed.zero_stage=2", "train.precision=bf16", "accumulate", "train.micro_batch=4"]),
    (1, ["train.recompute=full", "train.micro_batch=8"]),
    (2, ["engine=megatron", "parallel.expert=2", "train.micro_batch=8"]),
    (2, ["engine=megatron", "parallel.tensor=2", "train.micro_batch=8"]),
    (2, ["engine=megatron", "parallel.context=2", "train.micro_batch=8"]),
    (2, ["engine=megatron", "parallel.pipeline=2", "train.precision=bf16", "accumulate", "train.micro_batch=4"]),
    (2, ["deepspeed.zero_stage=1", "model.moe.moe_layer_freq=2", "model.moe.shared_hidden=1024",
         "train.micro_batch=8"]),
    (2, ["deepspeed.zero_stage=3", "train.micro_batch=4"]),
    (2, ["deepspeed.zero_stage=3", "parallel.expert=2", "train.precision=bf16", "accumulate"]),
    (2, ["deepspeed.zero_stage=3", "train.precision=bf16", "model.vocab_size=131072", "model.layers=8"]),
    (2, ["optimizer.kind=muon", "deepspeed.zero_stage=0"]),
    (2, ["optimizer.kind=muon", "deepspeed.zero_stage=1", "parallel.expert=2"]),
    (2, ["optimizer.kind=muon", "deepspeed.zero_stage=2", "train.precision=bf16"]),
    (2, ["optimizer.kind=muon", "engine=megatron", "parallel.tensor=2"]),
    (1, [*_LATENT, "train.micro_batch=8"]),
    (2, ["engine=megatron", "parallel.tensor=2", *_LATENT, "train.micro_batch=8"]),
    (1, [*_LONGCAT, "train.micro_batch=8"]),
    (2, ["engine=megatron", "parallel.pipeline=2", *_LONGCAT, "train.recompute=full", "accumulate",
         "train.micro_batch=4"]),
    (2, ["engine=megatron", "parallel.pipeline=2", "model.moe.moe_layer_freq=2", "train.recompute=full", "accumulate",
         "train.micro_batch=4"]),
    (2, ["model.mtp.layers=1", "parallel.expert=2", "train.micro_batch=8"]),
    (2, ["model.mtp.layers=2", "engine=megatron", "parallel.pipeline=2", "accumulate", "train.micro_batch=4"]),
    (2, ["model.mtp.layers=1", "engine=megatron", "parallel.tensor=2", "train.micro_batch=8"]),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "fields"), MEASURED, ids=lambda value: str(value).translate(_PLAIN))
def test_memory_and_traffic_are_as_measured(tmp_path, summary, ranks, fields):
    """Within 15% of the peak of all tensors in a step on these ranks."""
    given = load_config(None, [*_TINY, *(field for field in fields if field != "accumulate")])
    passes = ranks // given.parallel.model_parallel * (4 if "accumulate" in fields else 1)
    fields = [field for field in fields if field != "accumulate"]
    fields.append(f"train.global_batch={passes * given.train.micro_batch}")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--rdzv-backend", "c10d",
         "--rdzv-endpoint", "127.0.0.1:0", "-m", "tests.plan.measure", str(tmp_path / "result"), *_TINY, *fields],
        cwd=ROOT, env=os.environ | CPU | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    measured = json.loads((tmp_path / "result").read_text())
    own = layout(ranks, *fields)
    planned = memory_per_rank(own, 2.0, "cpu")
    peak = max(rank["peak"] for rank in measured)
    kept = planned.static / max(rank["static"] for rank in measured)
    summary.append(
        f"memory, {ranks} ranks, {' '.join(fields)}: planned {planned.total / 1e6:.0f} MB, measured {peak / 1e6:.0f} "
        f"({planned.total / peak:.3f}); between steps {kept:.3f}"
    )
    assert planned.total == pytest.approx(peak, rel=0.15)
    sent = estimate(own, 2.0, Hardware()).traffic["tokens to experts"].inside
    assert sent == pytest.approx(sum(rank["sent"] for rank in measured) / ranks, rel=0.15)


@pytest.mark.parametrize("fields", [
    ["model.moe.moe_layer_freq=2", "model.moe.shared_hidden=64", "model.moe.shared_gate=true", "model.head_dim=24"],
    [*_LATENT, "model.mtp.layers=1"], [*_LATENT[:2], *_LATENT[3:]], [*_LONGCAT],
])  # fmt: skip
def test_the_matrices_of_muon_are_those_of_the_model(fields):
    config = load_config(None, [*_TINY, *fields])
    with torch.device("meta"):
        model = Decoder(config.model, 4096, 0)
    held: Counter[tuple[int, int]] = Counter()
    for name, weight in model.named_parameters():
        if name.startswith("layers.") and ".router." not in name and weight.dim() > 1:
            shape = weight.shape[1:] if ".experts." in name else weight.shape
            count = len(weight) if ".experts." in name else 1
            for rows in rows_of_matrices(config.model, name, shape[0]):
                held[rows, shape[1]] += count
    planned: Counter[tuple[int, int]] = Counter()
    for layer in range(config.model.trained_layers):
        for experts in (True, False):
            for rows, columns, count in matrices_of_layer(config.model, layer, experts):
                planned[rows, columns] += count
    assert planned == held


def test_the_arithmetic_of_muon_is_counted():
    for shape in ((24, 40), (40, 24)):
        with FlopCounterMode(display=False) as counter:
            orthogonalize(torch.randn(1, *shape))
        assert counter.get_total_flops() == orthogonalization_flops(*shape)
    fields = ["optimizer.kind=muon", "parallel.expert=2", "train.global_batch=4"]
    hardware = Hardware(peak_tflops=1.0, efficiency=1.0, memory_gb_s=1e9)
    with_muon, without = (estimate(layout(4, *some), 2.0, hardware) for some in (fields, fields[1:]))
    # Four layers: queries and outputs, keys and values of half the heads, and three matrices of 8 experts.
    square, narrow, expert = (orthogonalization_flops(512, columns) for columns in (512, 256, 1024))
    assert with_muon.compute_s - without.compute_s == pytest.approx(4 * (2 * square + 2 * narrow + 24 * expert) / 4e12)
    assert without.traffic["matrices of Muon"].inside == 0
    # Each rank holds a quarter of the dense matrices and half of its experts, and sends parts and updates.
    dense = 4 * (2 * 512 * 512 + 2 * 512 * 256) * 4 * 2 / 4 * 3 / 4
    experts = 4 * 4 * 3 * 512 * 1024 * 4 * 2 / 2 / 2
    assert with_muon.traffic["matrices of Muon"].inside == pytest.approx(dense + experts)
