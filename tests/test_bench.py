"""The benchmarks run and write what they promise; what they measure is no test's business."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.timing import Passes, interleave, median_ratio, peak_bytes, saved_bytes
from tests.train.cases import CPU


def run_benchmark(folder: Path, *arguments: str) -> tuple[list[dict[str, Any]], str]:
    """The rows that a benchmark writes, and what it says."""
    path = folder / "rows.json"
    done = subprocess.run(
        [sys.executable, "-m", "bench", *arguments, "--json", str(path)],
        capture_output=True, text=True, check=False, timeout=120, cwd=Path(__file__).parents[1],
        env=os.environ | CPU,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text())["rows"], done.stdout


def test_the_layer_benchmark_writes_its_rows(tmp_path):
    small = ["--tokens", "64", "--hidden", "32", "--width", "16", "--experts", "4", "--mean-k", "2", "--repeats", "1"]
    rows, said = run_benchmark(tmp_path, "layer", *small)
    assert "agrees" in said
    methods = {"dense_floor", "dynmoe", "deepspeed_same_routing", "deepspeed_top2"}
    keys = {(row["method"], row["dtype"], row["direction"]) for row in rows}
    assert keys == {(m, t, d) for m in methods for t in ("bf16", "fp32") for d in ("forward", "backward", "both")}
    for row in rows:
        assert row["benchmark"] == "layer"
        assert row["mean_k"] == pytest.approx(2.0, abs=0.1)
        assert row["ratio_to_floor"] > 0
        assert row["method"] == "dense_floor" or (row["saved_bytes"] > 0 and row["peak_bytes"] > row["saved_bytes"] / 4)


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
    assert calls == ["floor", "ours"] * 4
    assert median_ratio(times["ours"], times["floor"], "forward") == 2.0  # of 2, 3 and 2
    assert median_ratio(times["ours"], times["floor"], "both") == pytest.approx(9 / 5)


def test_saved_and_peak_bytes_of_a_case_that_is_known():
    layer, x = torch.nn.Linear(16, 16), torch.randn(64, 16, requires_grad=True)
    assert saved_bytes(lambda: layer(x).exp(), layer) == 2 * 64 * 16 * 4  # the input, and exp's own output
    assert peak_bytes(lambda: torch.empty(1000).fill_(0)) == 4000
