"""A trace records the routing of each token in each layer, whichever rank computed it."""

from __future__ import annotations

import runpy
import sys

import pandas as pd
import pytest

from harness.processes import ROOT
from tests.engines.cases import GLOBAL_BATCH, LENGTH, batch_of_step
from tests.engines.routing_cases import train_and_keep
from tests.train.cases import read_rows

STEPS = 1  # one, as later ones depend on the accumulation: the balance loss counts over the passes so far
MEGATRON = "engine=megatron"
PLACE = ["layer", "sample", "position"]
WHOLE = ["model.router.kind=top_p", "train.micro_batch=8", "model.kv_heads=2", "model.layers=4"]
LAYOUTS = {
    "DeepSpeed EP 2, accumulation 2": ["train.micro_batch=2", "parallel.expert=2"],
    "Megatron PP 2, recomputed": [MEGATRON, "train.micro_batch=2", "parallel.pipeline=2", "train.recompute=full"],
    "Megatron TP 2": [MEGATRON, "train.micro_batch=4", "parallel.tensor=2"],
    "Megatron EP 2": [MEGATRON, "train.micro_batch=4", "parallel.expert=2"],
}


def read(folder) -> pd.DataFrame:
    return pd.read_parquet(folder).sort_values(PLACE, ignore_index=True)


@pytest.fixture(scope="module")
def of_one_rank(one_rank, tmp_path_factory):
    folder = tmp_path_factory.mktemp("traces")
    one_rank.run(train_and_keep, WHOLE, STEPS, str(folder))
    return read(folder)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_trace_is_the_same_in_every_layout(two_ranks, of_one_rank, tmp_path, layout):
    two_ranks.run(train_and_keep, [*WHOLE, *LAYOUTS[layout]], STEPS, str(tmp_path))
    trace = read(tmp_path)
    assert len(list(tmp_path.rglob("*.parquet"))) == 2
    for column in ("step", *PLACE, "token"):
        assert (trace[column] == of_one_rank[column]).all(), column
    assert trace["experts"].map(list).tolist() == of_one_rank["experts"].map(list).tolist()
    for own, other in zip(trace["gates"], of_one_rank["gates"], strict=True):
        assert own == pytest.approx(other, abs=1e-5)


def test_each_row_has_the_token_and_its_routing(two_ranks, tmp_path):
    """With routes dropped by capacity."""
    overrides = ["model.router.kind=top_p", "model.moe.capacity_factor=0.8", "train.micro_batch=2"]
    results = two_ranks.run(train_and_keep, overrides, STEPS, str(tmp_path))
    trace = read(tmp_path)
    tokens = batch_of_step(STEPS)
    assert len(trace) == 2 * GLOBAL_BATCH * LENGTH
    dropped = 0
    for row in trace.itertuples():
        assert (row.step, row.token) == (STEPS, tokens[row.sample, row.position])
        # Samples alternate by two between the ranks, first in one micro-batch, then in the next.
        rank = row.sample // 2 % 2
        micro_batch = row.sample // 4
        plan = results[rank]["plans"][row.layer, micro_batch]
        place = row.sample % 2 * LENGTH + row.position
        routed = plan["routed"][place]
        selected = plan["selected"][place]
        assert list(row.experts) == [e for e, on in enumerate(routed) if on]
        assert list(row.gates) == [plan["gates"][place][e] for e in row.experts]
        assert list(row.dropped) == [e for e, on in enumerate(selected) if on and not routed[e]]
        dropped += len(row.dropped)
    assert dropped > 0


def test_the_example_agrees_with_the_metrics(undisturbed, capsys, monkeypatch):
    run, _ = undisturbed
    monkeypatch.setattr(sys, "argv", ["read_traces.py", str(run)])
    example = runpy.run_path(str(ROOT / "examples" / "read_traces.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert all(f"{part}:\n" in said for part in ("experts per token", "tokens with the most experts"))
    routes = example["load"](run)
    traced = {row["train/step"]: row for row in read_rows(run / "metrics.jsonl") if row["train/step"] % 8 == 0}
    means = routes.pivot_table(index="step", columns="layer", values="k")
    for step, row in traced.items():
        for layer in (0, 1):
            assert means[layer][step] == pytest.approx(row[f"moe/layer_{layer:02d}/experts_per_token_mean"])
    experts = routes[routes["layer"] == 0]["experts"]
    pairs = example["pairs"](routes)
    assert pairs[0][(0, 1)] == sum({0, 1} <= set(own) for own in experts)


def test_the_flag_traces_every_step(monkeypatch):
    parse = runpy.run_path(str(ROOT / "train.py"))["parse_arguments"]
    for arguments, interval in (([], 0), (["--trace"], 1), (["--trace", "logging.trace_interval=5"], 5)):
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        assert parse()[0].logging.trace_interval == interval
