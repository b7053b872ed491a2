"""The comparison of routers: which units it trains, what they show, and how sure that is. Only slow tests train."""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import pyplot
from torch import Tensor

from bench import routing
from bench.report import replace_block
from bench.routing.comparison import FLOPS_TOLERANCE, Comparison, Plan, _next_steps, verdicts
from bench.routing.intervals import Interval, bootstrap, interval_of
from bench.routing.methods import METHODS, REFERENCE, RENORMALIZED
from bench.routing.units import Cell, Evidence, Outcome, Unit, outcome_of, read_rows
from dynmoe.config import load_config
from dynmoe.errors import UserError
from dynmoe.model import Decoder
from harness.processes import CPU

ROOT = Path(__file__).parents[1]
CODE = Cell(128, "code")
DOCS = Cell(128, "docs")
STEPS = 100
RATES = (1e-3, 2e-3, 4e-3)
BEST = {REFERENCE: 2e-3, RENORMALIZED: 2e-3, "top-k 4": 4e-3, "ReLU": 1e-3}
DIFFERENCES = {REFERENCE: 0, RENORMALIZED: -0.05, "top-k 4": -0.2, "ReLU": 0.1}
PER_STEP = dict.fromkeys(BEST, 100) | {"top-k 4": 150}


def outcome(unit: Unit) -> Outcome:
    """A made-up outcome: the ReLU router needs twice the FLOPs in its first 20 steps, top-k 4 half as many again."""
    flops = PER_STEP[unit.method] * unit.steps + (100 * min(20, unit.steps) if unit.method == "ReLU" else 0)
    noise = random.Random(unit.seed).random()  # that of the seed, common to all methods
    loss = 4 + noise + abs(unit.learning_rate - BEST[unit.method]) + DIFFERENCES[unit.method]
    return Outcome(loss, flops, 2048 * unit.steps, 2.0, [2.0, 2.0], 1.9, 1.5, [])


def trained(comparison: Comparison, units: dict[Unit, Outcome]) -> list[Unit]:
    """Trains what is missing, one by one, until nothing is; returns the units in order."""
    order = []
    while (unit := next(comparison.missing(), None)) is not None:
        assert unit not in units
        units[unit] = outcome(unit)
        order.append(unit)
    return order


def study(cells: tuple[Cell, ...] = (CODE,), seeds: int = 5) -> tuple[Comparison, dict[Unit, Outcome]]:
    units: dict[Unit, Outcome] = {}
    return Comparison(Plan(tuple(BEST), cells, RATES, "code", seeds, STEPS), units.get), units


def test_every_method_is_swept_before_it_is_compared_and_with_another_seed():
    comparison, units = study((CODE, DOCS))
    order = trained(comparison, units)
    sweep = [unit for unit in order if unit.seed >= 5]
    assert order[: len(sweep)] == sweep
    further = [(CODE, "top-k 4", 8e-3), (CODE, "ReLU", 5e-4)]  # the best was the last and the first
    assert {(unit.cell, unit.method, unit.learning_rate) for unit in sweep} == {
        *((CODE, method, rate) for method in BEST for rate in RATES), *further,
    }  # fmt: skip
    assert {(unit.method, unit.learning_rate) for unit in order[len(sweep) :]} == set(BEST.items())


def test_a_sweep_ends_after_two_further_rates():
    comparison, units = study(seeds=0)
    while (unit := next(comparison.missing(), None)) is not None:
        units[unit] = dataclasses.replace(outcome(unit), loss=unit.learning_rate)  # the smallest is always the best
    assert sorted({unit.learning_rate for unit in units}) == [2.5e-4, 5e-4, *RATES]
    assert comparison.learning_rate(128, REFERENCE) == 2.5e-4


def test_flops_are_matched_by_the_number_of_steps():
    comparison, units = study()
    trained(comparison, units)
    for method, steps in {REFERENCE: 100, RENORMALIZED: 100, "top-k 4": 67, "ReLU": 80}.items():
        for seed in range(5):
            pair = comparison.pair(CODE, method, seed)
            assert pair.missing is None
            assert pair.tokens.tokens == 2048 * STEPS
            assert abs(pair.flops.flops / (100 * STEPS) - 1) <= FLOPS_TOLERANCE
            assert abs(pair.flops.tokens / 2048 - steps) <= 1
    assert comparison.pair(CODE, REFERENCE, 0).flops is comparison.pair(CODE, REFERENCE, 0).tokens


def test_a_pair_that_cannot_be_matched_is_left_out():
    comparison, units = study()
    trained(comparison, units)
    for unit in list(units):
        if unit.method == "ReLU" and unit.seed == 1:
            units[unit] = dataclasses.replace(units[unit], flops=25_000)  # whatever the number of steps
    trained(comparison, units)
    (row,) = (row for row in comparison.rows() if row["method"] == "ReLU")
    assert row["pairs"] == 5
    assert row["pairs_without_match"] == 1
    assert row["cell_is_complete"]
    assert row["same_flops"] == Interval(pytest.approx(0.1), None, None)
    assert "(1 pair without match)" in routing.tables(list(comparison.rows()))
    assert verdicts(list(comparison.rows()))[1].endswith("in the one cell (width 128, code): none")


def test_matching_ends_between_a_run_below_and_one_above():
    """Dividing by the ratio would try 80 and 90 steps again and again, and later leave what is known."""
    comparison, units = study()
    trained(comparison, units)
    flops = {100: 1.25, 80: 0.889, 90: 1.125, 85: 0.96, 89: 1.1, 86: 0.995}
    for unit in [unit for unit in units if unit.method == "ReLU" and unit.seed < 5]:
        del units[unit]
    tried = []
    while (unit := next(comparison.missing(), None)) is not None:
        tried.append(unit.steps)
        units[unit] = dataclasses.replace(outcome(unit), flops=round(10_000 * flops[unit.steps]))
    assert tried[:5] == [100, 80, 90, 85, 89]
    assert comparison.pair(CODE, "ReLU", 0).flops.flops == 9950


def test_matching_tries_every_number_between_two_runs():
    assert _next_steps(136, {200: 1.5, 133: 0.98, 136: 1.3}) == 134  # neither 133 again, nor given up
    assert _next_steps(152, {151: 0.981, 152: 1.011}) in (151, 152)


def test_a_cell_that_is_not_complete_decides_nothing():
    comparison, units = study((CODE, DOCS))
    trained(comparison, units)
    for unit in list(units):
        if unit.cell == DOCS and unit.method == "ReLU" and unit.seed:
            del units[unit]
    rows = list(comparison.rows())
    assert verdicts(rows) == [
        "width 128, docs: not complete, so without influence on the next lines",
        "loss lower than both forms of top-2 at equal FLOPs in the one cell (width 128, code): top-k 4",
        "loss higher than both forms of top-2 at equal FLOPs in the one cell (width 128, code): ReLU",
    ]
    assert "+0.100 (4 pairs to come)" in routing.tables(rows)


def test_losses_are_compared_seed_by_seed():
    """The seeds differ by far more than the methods, which cancels in the differences."""
    comparison, units = study()
    trained(comparison, units)
    rows = {row["method"]: row for row in comparison.rows()}
    assert statistics.stdev(units[unit].loss for unit in units if unit.method == REFERENCE) > 0.05
    for method, difference in DIFFERENCES.items():
        assert rows[method]["same_tokens"] == pytest.approx((difference,) * 3)
        assert rows[method]["same_flops"] == pytest.approx((difference,) * 3)
        assert rows[method]["same_flops_renormalized"] == pytest.approx((difference + 0.05,) * 3)
    assert rows["top-k 4"]["flops_ratio"] == 1.5
    assert rows["top-k 4"]["learning_rate"] == 4e-3
    assert verdicts(list(comparison.rows())) == [
        "loss lower than both forms of top-2 at equal FLOPs in the one cell (width 128, code): top-k 4",
        "loss higher than both forms of top-2 at equal FLOPs in the one cell (width 128, code): ReLU",
    ]


def test_a_verdict_must_hold_in_every_cell():
    comparison, units = study((CODE, DOCS))
    trained(comparison, units)
    for unit in units:
        if unit.cell == DOCS and unit.method == "top-k 4":
            units[unit] = dataclasses.replace(units[unit], loss=units[unit].loss + 0.2 + 0.01 * (unit.seed - 2))
    lower, higher, *_ = verdicts(list(comparison.rows()))
    assert lower == "loss lower than both forms of top-2 at equal FLOPs in all 2 cells: none"
    assert higher == "loss higher than both forms of top-2 at equal FLOPs in all 2 cells: ReLU"


def test_a_verdict_must_hold_against_both_forms_of_top_2():
    """A router of renormalized gates that only beats top-2 without them."""
    comparison, units = study()
    trained(comparison, units)
    for unit in units:
        if unit.method == RENORMALIZED:
            units[unit] = dataclasses.replace(units[unit], loss=units[unit].loss - 0.2)
    lower, higher = verdicts(list(comparison.rows()))
    assert lower.endswith(": none")
    assert higher.endswith(": ReLU")


@pytest.mark.parametrize(("pairs", "at_least"), [(5, 0.9), (8, 0.92), (20, 0.93)])
def test_the_interval_holds_the_true_mean_nearly_as_often_as_it_says(pairs, at_least):
    """1,500 experiments: the standard error of the share is 0.7 %. Plain percentiles of five pairs reach 0.83."""
    samples = np.random.default_rng(1).normal(0.3, 1.0, (1500, pairs))
    low, high = bootstrap(samples, resamples=4000)
    assert at_least <= np.mean((low <= 0.3) & (high >= 0.3)) <= 0.97


def test_four_pairs_have_no_interval():
    assert interval_of([0.1, 0.3] * 2) == Interval(pytest.approx(0.2), None, None)
    assert interval_of([0.1, 0.3] * 2).verdict == "undecided"
    assert str(interval_of([-0.1] * 5)) == "−0.100 [−0.100, −0.100]"
    assert interval_of([-0.1, 0.0, 0.1, -0.2, 0.2]).verdict == "undecided"


def test_every_method_is_a_valid_configuration():
    for method in METHODS:
        for cell in (CODE, Cell(256, "code")):
            load_config(ROOT / "configs" / "quickstart.yaml", Unit(cell, method, 1e-3, 0, 100).overrides)
    assert len({Unit(CODE, method, 1e-3, 0, 100).path for method in METHODS}) == len(METHODS)


def test_runs_of_a_seed_start_with_the_same_shared_weights():
    def weights(method: str, seed: int) -> dict[str, Tensor]:
        config = load_config(ROOT / "configs" / "quickstart.yaml", Unit(CODE, method, 1e-3, seed, 100).overrides)
        return dict(Decoder(config.model, vocab_size=64, seed=config.train.seed).named_parameters())

    reference = weights(REFERENCE, 0)
    shared = {name for name in reference if ".router." not in name}
    assert len(shared) > 20
    for method in METHODS:
        own = weights(method, 0)
        assert {name for name in own if ".router." not in name} == shared
        assert all(torch.equal(own[name], reference[name]) for name in shared), method
    other = weights(REFERENCE, 1)
    assert not any(torch.equal(other[name], reference[name]) for name in shared if "norm" not in name)


def rows_of_a_run() -> list[dict[str, Any]]:
    return [
        {
            "train/tokens": 10 * step, "train/lm_loss": 8.0 - step, "train/cumulative_flops": 7 * step,
            "moe/experts_per_token_mean": step + 0.5, "moe/load_max_over_mean": 2.0 * step,
            "moe/layer_00/experts_per_token_mean": float(step), "moe/layer_01/experts_per_token_mean": step + 1.0,
            **({"eval/loss": 3.0, "eval/domains/a.b/experts_per_token_mean": 1.7} if step == 8 else {}),
        }
        for step in range(1, 9)
    ]  # fmt: skip


def test_the_outcome_of_a_run():
    made = outcome_of(rows_of_a_run())
    assert (made.loss, made.flops, made.tokens, made.experts_evaluated) == (3.0, 56, 80, 1.7)
    assert made.experts == 5.0  # mean of 1.5 to 8.5
    assert made.experts_settled == [7.5, 8.5]  # steps 7 and 8
    assert made.load_max_over_mean == 15.0
    assert made.curve[-1] == {"tokens": 80, "loss": 0.0, "experts": [8.0, 9.0]}


def test_steps_that_were_skipped_have_no_part_in_the_outcome(tmp_path):
    rows = rows_of_a_run()
    counts = ("train/tokens", "train/cumulative_flops", "eval/")
    last = {name: value for name, value in rows[-1].items() if name.startswith(counts)}
    for given in ([*rows[:3], {"train/tokens": 30}, *rows[3:]], [*rows, last]):
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
        assert outcome_of(read_rows(tmp_path)) == outcome_of(rows)


def kept(folder: Path, unit: Unit, **changes: Any) -> None:
    path = folder / unit.path
    path.parent.mkdir(exist_ok=True)
    content = {"overrides": unit.overrides, "text": "abc", "outcome": dataclasses.asdict(outcome(unit))}
    path.write_text(json.dumps(content | changes))


def test_units_of_other_fields_or_text_are_refused(tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    unit = Unit(CODE, REFERENCE, 2e-3, 0, STEPS)
    evidence = Evidence(tmp_path, {"code": corpus}, tmp_path)
    assert evidence.get(unit) is None
    kept(tmp_path, unit)
    assert evidence.get(unit) == outcome(unit)
    (corpus / "manifest.json").write_text(json.dumps({"files": {"train.bin": {"sha256": "abd"}}}))
    with pytest.raises(UserError, match=r"was trained on another text than .*corpus; use another directory"):
        evidence.get(unit)
    kept(tmp_path, unit, overrides=["train.seed=1"])
    with pytest.raises(UserError, match=r"seed0_100.json: was trained with other fields; use another directory"):
        evidence.get(unit)


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    import os

    return subprocess.run([sys.executable, "-m", "bench", "routing", *arguments], capture_output=True, text=True,
                          check=False, cwd=ROOT, env=os.environ | CPU, timeout=600)  # fmt: skip


def test_the_report_of_trained_units(tmp_path):
    comparison, units = study((CODE, DOCS))
    trained(comparison, units)
    for unit in units:
        kept(tmp_path, unit)
    page = tmp_path / "page.md"
    page.write_text("Before\n<!-- routing -->\nold\n<!-- end of routing -->\nafter\n")
    arguments = ["--evidence", str(tmp_path), "--methods", *BEST, "--corpora", "code=none", "docs=none",
                 "--cells", "code-128", "docs-128", "--learning-rates", *map(str, RATES), "--seeds", "5",
                 "--steps", str(STEPS)]  # fmt: skip
    done = bench(*arguments, "--page", str(page), "--plot", str(tmp_path / "plot.png"))
    assert done.returncode == 0, done.stderr
    text = page.read_text()
    assert "old" not in text
    row = "| top-k 4 | 0.004 | 2.00 | 1.90 | × 1.5 | × 1.500 | −0.200 [−0.200, −0.200] | × 0.670 | −0.200 ["
    assert row in text
    assert "| ReLU | `model.router.kind=relu budget.experts_per_token=2` |" in text
    assert text.endswith("<!-- end of routing -->\nafter\n")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    parser = argparse.ArgumentParser()
    routing.add_arguments(parser)
    with pytest.raises(UserError, match=r"--evidence .*: has no complete pair .*; train some with --hours"):
        routing.run(parser.parse_args([*arguments, "--methods", REFERENCE, RENORMALIZED, "--steps", "50"]))


def test_the_page_shows_the_evidence():
    """If this fails: python -m bench routing --page docs/science.md --plot docs/figures/routing.png"""
    page = (ROOT / "docs" / "science.md").read_text()
    parser = argparse.ArgumentParser()
    routing.add_arguments(parser)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        comparison, _ = routing.open_study(parser.parse_args([]))
        shown = routing.tables(list(comparison.rows()))
    assert replace_block(page, "routing", shown) == page


def test_mistakes_in_the_arguments():
    parser = argparse.ArgumentParser()
    routing.add_arguments(parser)
    for arguments, message in {
        ("--corpora", "data/stdlib"): "--corpora data/stdlib: is not NAME=DIR",
        ("--methods", "ReLU"): "--methods: top-k 2 is missing",
        ("--cells", "text-128"): "--cells text-128: is not NAME-WIDTH; use for example code-128",
    }.items():
        with pytest.raises(UserError, match=re.escape(message)):
            routing.open_study(parser.parse_args(arguments))
    with pytest.raises(UserError, match="lacks the comments"):
        replace_block("<!-- end of a --> <!-- a -->", "a", "text")


def test_a_plot_without_intervals():
    comparison, units = study(seeds=2)
    trained(comparison, units)
    figure = pyplot.figure()
    axes = figure.add_subplot()
    routing.plot(list(comparison.rows()), axes)
    best_on_top = ["ReLU", REFERENCE, "top-k 4"]
    assert [label.get_text() for label in axes.get_yticklabels()] == best_on_top
    pyplot.close(figure)


@pytest.mark.slow
def test_units_are_trained_and_resumed(corpus_dir, tmp_path):
    """Two methods on a small corpus, stopped after the sweep; top-k 4 needs a second run for equal FLOPs."""
    arguments = ["--corpora", f"code={corpus_dir}", "--methods", REFERENCE, RENORMALIZED, "top-k 4",
                 "--cells", "code-128", "--seeds", "1", "--steps", "6", "--learning-rates", "1e-3",
                 "--evidence", str(tmp_path / "evidence"), "--scratch", str(tmp_path / "runs")]  # fmt: skip
    done = bench(*arguments, "--hours", "1e-6", "--workers", "1")
    assert done.returncode == 2  # the time is over after one unit
    assert [path.name for path in (tmp_path / "evidence").rglob("*.json")] == ["top-k-2_lr0.001_seed1000_6.json"]
    done = bench(*arguments, "--hours", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "seed1000" in done.stdout
    assert "top-k-2_lr0.001_seed1000_6.json: done" not in done.stdout
    names = {path.name for path in (tmp_path / "evidence").rglob("*.json")}
    assert any(re.fullmatch(r"top-k-4_lr.*_seed0_4\.json", name) for name in names)
    assert not list((tmp_path / "runs").glob("*"))
    kept = json.loads(next((tmp_path / "evidence").rglob("*.json")).read_text())
    assert kept["versions"].keys() == {"python", "torch", "commit"}
