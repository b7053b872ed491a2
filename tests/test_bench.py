"""The benchmarks run and write their rows and pages; tests do not check the measurements."""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import re
import subprocess
import sys
import weakref
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib import pyplot
from packaging.version import Version

from bench import end_to_end, gpu_layer, launches, since
from bench.__main__ import BENCHMARKS, main
from bench.cases import DTYPES, Method, check
from bench.deepspeed_peers import mixtral_with_our_weights
from bench.machine_code import Work, seconds_of, work_of
from bench.timing import Passes, interleave, median_ratio, saved_bytes
from dynmoe.config import load_config
from dynmoe.errors import UserError
from dynmoe.model import Decoder
from dynmoe.moe.layer import capture_plans
from harness.machine_code import CARDS, SHAPES, Compiled
from harness.memory import peak_bytes
from harness.plans import Shape, spread_plan
from harness.processes import CPU


def run_benchmark(folder: Path, *arguments: str, timeout_s: float = 120) -> tuple[list[dict[str, Any]], str]:
    """The rows that a benchmark writes, and what it says."""
    path = folder / "rows.json"
    done = subprocess.run(
        [sys.executable, "-m", "bench", *arguments, "--json", str(path)],
        capture_output=True, text=True, check=False, timeout=timeout_s, cwd=Path(__file__).parents[1],
        env=os.environ | CPU,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text())["rows"], done.stdout


SMALL = ["--tokens", "64", "--hidden", "32", "--repeats", "1"]
PEERS = {"dynmoe", "deepspeed_moe", "deepspeed_autoep", "megatron_moe"}


def test_what_needs_a_gpu_judges_its_rows():
    rows = [{"limit": limit, "waits": waits, "kernels": 9, "ours": 8} for limit, waits in (("none", 1), (2.5, 1))]
    assert [line.rpartition(": ")[2] for line in launches.verdicts(rows)] == ["reached", "missed by 1.000"]
    row = {"method": "triton", "experts": 16, "mean_k": 2.0, "load": 1.5, "wanted": "", "waits": 0}
    assert len(gpu_layer.verdicts([row])) == 1  # without grouped_mm in the same run
    assert len(gpu_layer.verdicts([row | {"over_grouped_mm": 1.4}])) == 2


def rows_of(name: str, arguments: list[str]) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows and verdicts of a benchmark, in a process of a pool."""
    parser = argparse.ArgumentParser()
    BENCHMARKS[name].add_arguments(parser)
    rows = BENCHMARKS[name].run(parser.parse_args(arguments))
    figure = pyplot.figure()
    if hasattr(BENCHMARKS[name], "plot"):
        BENCHMARKS[name].plot(rows, figure.add_subplot())
    pyplot.close(figure)
    return rows, BENCHMARKS[name].verdicts(rows)


def test_the_layer_against_the_dense_floor_and_its_peers(one_rank):
    small = [*SMALL, "--width", "16", "--experts", "4", "--mean-k", "2", "--skewed", "8:2:3"]
    ((rows, verdicts),) = one_rank.run(rows_of, "layer", small)
    given = (PEERS - {"dynmoe"}) | {"dynmoe_given_routing", "deepspeed_top2"}
    expected = {(method, t, 4) for method in given | {"dynmoe"} for t in DTYPES}
    assert {(r["method"], r["dtype"], r["experts"]) for r in rows} == expected | {
        (m, t, 8) for m in given for t in DTYPES
    }
    for row in rows:
        assert row["mean_k"] == pytest.approx(2.0, abs=0.1)
        assert min(row["forward"], row["backward"], row["both"]) > 0
        assert row["peak_bytes"] > row["saved_bytes"] / 4 > 0
        assert row["padding"] == 3.0 or row["experts"] == 4
    assert verdicts[0].startswith("bf16, K̄ 2")


@pytest.mark.slow  # identity experts themselves are tested in tests/moe and tests/routing
def test_identity_experts_against_plain_top_k(tmp_path):
    small = [*SMALL, "--width", "16", "--experts", "4", "--identity", "2", "--ranks", "2"]
    (row,), said = run_benchmark(tmp_path, "zero_computation", *small)
    assert row["mean_k"] == pytest.approx(2.0, abs=0.1)
    assert min(row["forward"], row["backward"], row["both"]) > 0
    assert 0.3 < row["sent"] < 1.0
    assert "fp32, K̄ 2" in said


def test_a_method_with_a_different_output_is_not_timed():
    layer = torch.nn.Linear(4, 4)
    for wrong in (lambda x: 1.01 * layer(x), lambda x: layer(x).detach() + 1.01 * (layer(x) - layer(x).detach())):
        with pytest.raises(SystemExit, match=r"fp32: wrong differs from right by .*; no timings"):
            check("fp32", [Method("right", layer, layer), Method("wrong", layer, wrong)], torch.randn(3, 4))


@pytest.mark.parametrize(
    ("name", "arguments", "rows_expected"),
    [
        ("dispatch", [*SMALL, "--experts", "4"], 2 * 4),
        ("growth", ["--repeats", "1", "--scale", "16"], 2 * 11),
        ("imbalance", [*SMALL, "--width", "16", "--experts", "4", "--imbalances", "1", "2"], 4 * 2),
        ("memory", ["--tokens", "64", "--hidden", "32", "--width", "16", "--experts", "4", "--mean-k", "2"], 2 * 4),
        pytest.param(  # its kernels run in the interpreter
            "gpu_layer", ["--shrink", "256", "--dtype", "fp32", "--repeats", "1"], 3 * 2, marks=pytest.mark.slow
        ),
        pytest.param("statistics", ["--repeats", "1"], 3, marks=pytest.mark.slow),
        pytest.param(
            "gradient_watch",
            ["configs/quickstart.yaml", "model.layers=1", "data.sequence_length=16", "--repeats", "1"],
            2 * 3,
            marks=pytest.mark.slow,
        ),
        ("router", [*SMALL, "--width", "16", "--experts", "4", "16"], 2 * 2),
    ],
)
def test_a_benchmark_gives_its_rows(one_rank, name, arguments, rows_expected):
    ((rows, verdicts),) = one_rank.run(rows_of, name, arguments)
    assert len(rows) == rows_expected
    assert verdicts
    figures = [value for row in rows for value in row.values() if isinstance(value, float)]
    assert all(math.isfinite(value) for value in figures)


def test_plans_have_the_requested_load():
    plan = spread_plan(Shape(tokens=64, experts=8), 2.5, imbalance=3.0)
    load_E = plan.tokens_per_expert_E
    assert load_E.sum() == 160
    assert load_E.max() == 60  # 3 x 20
    assert load_E[1:].max() - load_E[1:].min() <= 1
    with pytest.raises(ValueError, match="imbalance=8"):
        spread_plan(Shape(tokens=64, experts=8), 2.5, imbalance=8.0)


@pytest.mark.slow  # what one layer sends is tested to the byte in tests/moe
def test_sent_bytes_are_those_of_one_row_per_token_and_rank(tmp_path):
    small = ["--tokens", "32", "--hidden", "256", "--experts", "4", "--mean-k", "2", "--ranks", "1", "2"]
    rows, said = run_benchmark(tmp_path, "wire", *small)
    alone, spread = rows
    assert alone["sent_bytes"] == 0
    assert 1.0 < spread["over_tokens"] < 1.05
    assert spread["over_routed_rows"] < 1.0
    assert said.count(": reached") == 2


@pytest.mark.slow  # the counts themselves are tested in tests/engines
def test_the_counts_of_a_step_are_reported_for_each_layout(tmp_path):
    rows, said = run_benchmark(tmp_path, "collectives", "--layers", "2", "4")
    assert len(rows) == 3 * 2 * 2
    assert all(row["collectives, ours"] > 0 < row["collectives, engine"] for row in rows)
    assert said.count(": reached") == 3 * 2


@pytest.mark.slow  # exports give the model's tokens in tests/hf
def test_generation_gives_the_tokens_of_the_export(tmp_path):
    few = ["--models", "quickstart", "--tokens", "3", "--rounds", "1"]
    rows, said = run_benchmark(tmp_path, "generation", *few)
    assert [row["texts"] for row in rows] == [1, 8]
    assert all(row["tokens/s / transformers'"] > 0 for row in rows)
    assert said.count("target at least 1.5") == 2


@pytest.mark.slow
def test_whole_steps_of_both_engines_and_of_deepspeeds_own_layer(tmp_path, corpus_dir):
    sizes = ["model.hidden=32", "model.moe.expert_hidden=32", "model.layers=2", "data.sequence_length=32",
             f"data.dirs=[{corpus_dir}]"]  # fmt: skip
    methods = [*end_to_end.METHODS]
    if Version(version("transformers")) >= Version("5.23"):
        methods.remove("deepspeed_autoep")
    named = ["--methods", *methods, "--steps", "6"]
    rows, _ = run_benchmark(tmp_path, "end_to_end", "configs/quickstart.yaml", *sizes, *named)
    assert [row["method"] for row in rows] == methods
    for row in rows:
        assert row["experts_per_token"] == 2 or row["router"] == "top_p"
        assert 0 < row["moe_share"] < 1
        assert row["time_over_first"] > 0
        assert row["loss_at_end"] == pytest.approx(rows[0]["loss_at_end"], rel=0.2)
    first = {row["method"]: row["curve"][0][1] for row in rows}
    same = [loss for method, loss in first.items() if method.startswith("top_k") or method == "deepspeed_autoep"]
    assert same == pytest.approx([first["top_k, deepspeed"]] * len(same), rel=1e-5)


def test_the_mixtral_of_deepspeeds_autoep_starts_as_our_model():
    """Of a single layer, its balance loss is ours too, which is computed here by its formula."""
    fields = [*end_to_end.METHODS["deepspeed_autoep"], "model.layers=1", "model.hidden=32", "model.kv_heads=2",
              "model.moe.experts=8", "model.moe.expert_hidden=32", "model.init_std=0.3",
              "model.router.balance_loss=0.1"]  # fmt: skip
    config = load_config("configs/quickstart.yaml", fields)
    tokens_BS = torch.arange(128).view(2, 64) * 7 % 61
    theirs = mixtral_with_our_weights(config, 64)
    ours = Decoder(config.model, 64, config.train.seed)
    out = theirs(tokens_BS)
    with capture_plans(ours.moe_layers) as plans:
        torch.testing.assert_close(out.logits, ours(tokens_BS), rtol=1e-4, atol=1e-5)
    share_E = plans[0].tokens_per_expert_E / plans[0].tokens_per_expert_E.sum()
    balance = 0.1 * 8 * (share_E * plans[0].scores_TE.mean(dim=0)).sum().item()
    assert theirs.router_aux_loss_coef * out.aux_loss.item() == pytest.approx(balance, rel=1e-5)


@pytest.mark.slow
def test_a_commit_is_compared_with_another(tmp_path, corpus_dir):
    tiny = ["data.sequence_length=32", "--data", str(corpus_dir), "--ranks", "1", "--steps", "3", "--turns", "1"]
    (row,), said = run_benchmark(tmp_path, "since", *tiny, "--commit", "HEAD", timeout_s=240)
    assert row["step"] > 0 < row["start"]
    assert "step over HEAD" in said


def test_a_commit_that_is_not_there_is_said(tmp_path):
    parser = argparse.ArgumentParser()
    since.add_arguments(parser)
    with pytest.raises(UserError, match="--commit none-of-that-name: git has no such commit"):
        since.run(parser.parse_args(["--commit", "none-of-that-name", "--data", str(tmp_path)]))


def test_each_benchmark_has_a_number_of_its_own():
    """The sections of the page are known by it."""
    numbers = [re.match(r"Benchmark \d+", module.__doc__) for module in BENCHMARKS.values()]
    found = [number[0] for number in numbers if number]
    assert len(found) > 15
    assert len(set(found)) == len(found)


def test_the_page_has_measurements_and_targets(tmp_path, monkeypatch):
    rows = [{"dtype": "fp32", "experts": e, "mean_k": 2.0, "forward": 0.02, "both": 0.031} for e in (16, 64)]
    document = {"machine": "a machine", "torch": "2.0", "commit": "a1b2c3d", "rows": rows}
    (tmp_path / "router.json").write_text(json.dumps(document))
    page = tmp_path / "performance.md"
    monkeypatch.setattr(sys, "argv", ["bench", "all", "--only", "--page", str(page), "--figures", str(tmp_path)])
    main()
    text = page.read_text()
    assert "## Benchmark 9: the router with its auxiliary losses" in text
    assert "On: a machine; torch 2.0; code of commit a1b2c3d." in text
    assert "dtype fp32, mean k 2.000, forward 0.020, both 0.031." in text  # the same in every row
    assert "| experts |" in text
    assert "- fp32, E 16: share of the layer: 0.031, target at most 0.03: missed by 0.001" in text
    assert "Benchmark 1" not in text


def test_a_page_keeps_what_no_benchmark_writes(tmp_path, monkeypatch):
    rows = [{"dtype": "fp32", "experts": 16, "both": 0.02}]
    document = {"machine": "a machine", "torch": "2.0", "commit": "a1b2c3d", "rows": rows}
    (tmp_path / "router.json").write_text(json.dumps(document))
    page = tmp_path / "performance.md"
    page.write_text(
        "# Performance\n\nOld.\n\n## Benchmark 9: an older title.\n\nOld rows.\n\n"
        "## Benchmark 15: by hand.\n\nServed.\n\n### A part of it\n\nMore.\n"
    )
    monkeypatch.setattr(sys, "argv", ["bench", "all", "--only", "--page", str(page), "--figures", str(tmp_path)])
    main()
    text = page.read_text()
    assert "Old" not in text
    assert text.index("## Benchmark 9: the router") < text.index("## Benchmark 15: by hand.\n\nServed.\n\n### A part")
    assert text.endswith("More.\n")
    main()
    assert page.read_text() == text


def test_a_roofline_adds_what_nothing_overlaps():
    """A product that the matrix units bound, and one that waits for the memory when it stores."""
    card = replace(CARDS[90], tflops=100.0, terabytes_per_second=1.0)
    tiles = {"ROWS": 128, "COLUMNS": 256, "DEPTH": 64}
    compiled = Compiled("rows", 90, "bf16", ("fine",), tiles, 8, 128, 0, 0, 1, {"HGMMA.64x256x16.F32.BF16": 4})
    work = Work(rows=1000, columns=1000, depth=50_000, read=10, moved=500_000)
    assert seconds_of(compiled, work, card) == pytest.approx(1e-3 + 1e-6)
    assert seconds_of(replace(compiled, blocks=2), work, card) == pytest.approx(1e-3)
    slow = replace(compiled, loop={"HGMMA.64x256x16.F32.BF16": 4, "IADD3": 100_000})
    iterations = 1000 * 1000 * 50_000 / (128 * 256 * 64)
    issued = iterations * 100_004 * 2 / (132 * card.clock_ghz * 1e9)
    assert seconds_of(slow, work, card) == pytest.approx(issued + 1e-6)


@pytest.mark.parametrize("layer", ["fine", "wide", "many"])
def test_products_of_the_roofline_are_all_of_the_layer(layer):
    shape, k = SHAPES[layer]
    names = ("up", "rows down", "activation gradient", "rows input gradient", "weights down", "weights up")
    flops = sum(work_of(name, layer).flops for name in names)
    assert flops == 18 * shape.tokens * k * shape.hidden * shape.width


@pytest.mark.slow
def test_the_smoke_run_compares_both_engines(tmp_path):
    small = ["--layers", "2", "--hidden", "32", "--heads", "2", "--experts", "4", "--width", "16", "--length", "16"]
    rows, said = run_benchmark(tmp_path, "gpu_smoke", *small, "--steps", "4")
    assert "losses of the two engines agree within 0." in said
    assert [row["method"] for row in rows] == ["deepspeed", "megatron"]
    assert all(row["tokens_per_s"] > 0 and row["tflops"] > 0 for row in rows)
    assert rows[0]["experts_per_token"] == pytest.approx(rows[1]["experts_per_token"], rel=0.05)


def test_methods_take_turns_and_ratios_are_of_the_same_turn():
    calls: list[str] = []

    def method(name: str, seconds: list[float]):
        def run() -> Passes:
            calls.append(name)
            return Passes(seconds.pop(0), 1.0)

        return run

    times = interleave(
        {"floor": method("floor", [9.0, 1.0, 2.0, 4.0]), "ours": method("ours", [9.0, 2.0, 6.0, 8.0])}, 3
    )
    # After the warm-up, each turn begins with another one.
    assert calls == ["floor", "ours", "floor", "ours", "ours", "floor", "floor", "ours"]
    assert median_ratio(times["ours"], times["floor"], "forward") == 2.0  # of 2, 3 and 2
    assert median_ratio(times["ours"], times["floor"], "both") == pytest.approx(9 / 5)


def test_saved_and_peak_bytes_of_a_known_case():
    layer = torch.nn.Linear(16, 16)
    x = torch.randn(64, 16, requires_grad=True)
    assert saved_bytes(lambda: layer(x).exp(), layer) == 2 * 64 * 16 * 4  # the input, and exp's own output
    assert peak_bytes(lambda: torch.empty(1000).fill_(0)) == 4000


def test_nothing_stays_in_memory_after_its_saved_bytes_are_counted():
    layer = torch.nn.Linear(16, 16)
    outputs = []

    def forward() -> torch.Tensor:
        output = layer(torch.randn(64, 16)).exp()
        outputs.append(weakref.ref(output))
        return output

    saved_bytes(forward, layer)
    gc.collect()
    assert outputs[0]() is None
