"""The statistics of the paper's findings, on data whose answer is known; only the slow test trains."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bench.findings import STATISTICS, rows_of, table, verdict_of
from bench.routing.intervals import Interval
from bench.token_statistics import Tokens, associations, by_bins, read_tokens
from dynmoe.data.batches import PretrainingData
from dynmoe.data.corpus import Corpus
from dynmoe.trained import open_trained
from harness.processes import CPU

ROOT = Path(__file__).parents[1]


def made_tokens(experts: Any, ids: Any, loss: Any, length: int | None = None) -> Tokens:
    """Tokens of sequences of this length, by default of a single one."""
    position = np.arange(len(ids)) % (length or len(ids))
    own = np.where(position == 0, np.nan, np.roll(np.asarray(loss, dtype=float), 1))
    return Tokens(np.asarray(ids), position, np.asarray(experts, dtype=float), np.asarray(loss, dtype=float), own)


def test_tokens_that_use_more_experts_where_the_loss_is_higher():
    generator = np.random.default_rng(0)
    ids = generator.integers(0, 5, 2000)
    loss = generator.normal(size=2000)
    found = associations(made_tokens(loss**3, ids, loss), np.arange(2000))
    assert found["loss"] == 1.0
    assert found["loss_within_token"] > 0.9
    assert abs(found["surprise"]) < 0.1
    assert abs(found["position"]) < 0.1
    assert found["rarity"] == found["position"]
    assert found["share_of_token"] < 0.01


def test_experts_that_depend_on_the_token_id_only():
    """Then they go with the loss if the ids do, but not within an id."""
    generator = np.random.default_rng(0)
    ids = generator.integers(0, 5, 2000)
    noise = generator.normal(size=(2, 2000))
    found = associations(made_tokens(ids + 1e-3 * noise[0], ids, ids + noise[1]), -ids)
    assert found["loss"] > 0.5
    assert found["rarity"] < -0.95
    assert found["share_of_token"] == 1.0
    assert abs(found["loss_within_token"]) < 0.1


def test_sequences_may_differ_where_their_tokens_do_not():
    """A loss that varies within a sequence says nothing, one that varies between sequences everything, and back."""
    generator = np.random.default_rng(0)
    within, between = generator.normal(size=(40, 50)), generator.normal(size=(40, 1))
    within -= within.mean(axis=1, keepdims=True)
    within, between = within / within.std(), (between - between.mean()) / between.std()
    ids = generator.integers(0, 5, 2000)
    found = associations(made_tokens((within - between).ravel(), ids, (within + between).ravel(), 50), ids)
    assert found["loss_of_sequence"] == -1.0
    found = associations(made_tokens((between - within).ravel(), ids, (within + between).ravel(), 50), ids)
    assert found["loss_of_sequence"] == 1.0
    assert abs(found["loss"]) < 0.1


def test_ids_that_occur_seldom_are_left_out_of_the_means():
    ids = np.array([0, 0, 1, 1] * 10 + [2, 3, 4])
    experts = np.where(ids == 0, 1.0, 3.0) + np.array([0.5, -0.5] * 20 + [9.0, 9.0, 9.0])
    found = associations(made_tokens(experts, ids, np.arange(43)), ids)
    assert found["share_of_token"] == pytest.approx(0.8)  # 1 between ids, 0.25 within


def test_means_of_tenths():
    assert by_bins(np.arange(20.0), -np.arange(20)) == [18.5 - 2 * part for part in range(10)]
    assert by_bins(np.arange(20.0), np.zeros(20)) == [0.5 + 2 * part for part in range(10)]


OF_LAYERS = ("change", "lower_minus_upper", "without_first")


def seed(first: float, last: float, middle: float = 3.0, **changes: float) -> dict[str, Any]:
    """A training whose three layers fall evenly to half of what they start with."""
    falling = np.linspace(1, 0.5, 40)[:, None] * np.array([first, middle, last])
    names = [name for name in STATISTICS if name not in OF_LAYERS]
    return {"experts_by_layer": falling.tolist(), "statistics": dict.fromkeys(names, 0.1) | changes}


def test_verdicts_follow_from_the_interval_over_seeds():
    seeds = [seed(4 + 0.1 * n, 2.0, 1.0, loss=-0.2 - 0.01 * n, rarity=0.1 * (n - 2)) for n in range(5)]
    rows = {row["statistic"]: row for row in rows_of(seeds)}
    weak = {row["statistic"]: row for row in rows_of([seed(3.1, 3.0, loss=0.04 + 1e-3 * n) for n in range(5)])}
    change = rows[STATISTICS["change"][0]]
    # Of the mean of the layers: parts 36 to 39 (mean 37.5 of 39) minus parts 4 to 7 (5.5).
    assert change["mean"].mean == pytest.approx(-0.5 * (37.5 - 5.5) / 39 * (4.2 + 1 + 2) / 3)
    assert change["verdict"] == "seen"
    assert rows[STATISTICS["lower_minus_upper"][0]]["mean"].mean == pytest.approx((4.2 - 2) * (1 - 0.5 * 37.5 / 39))
    assert rows[STATISTICS["lower_minus_upper"][0]]["verdict"] == "seen"
    without_first = rows[STATISTICS["without_first"][0]]
    assert without_first["mean"].mean == pytest.approx((1 - 2) * (1 - 0.5 * 37.5 / 39))
    assert without_first["verdict"] == "the opposite is seen"
    few = [seed(4.0, 2.0, loss_of_sequence=0.15 + 1e-3 * n) for n in range(5)]
    rows_of_few = {row["statistic"]: row for row in rows_of(few)}
    assert rows_of_few[STATISTICS["loss_of_sequence"][0]]["verdict"] == "not seen at this size"  # of 512 sequences
    for name in ("lower_minus_upper", "loss"):  # sure, but too small
        assert weak[STATISTICS[name][0]]["mean"].verdict == "higher"
        assert weak[STATISTICS[name][0]]["verdict"] == "not seen at this size"
    assert rows[STATISTICS["loss"][0]]["verdict"] == "the opposite is seen"
    assert rows[STATISTICS["rarity"][0]]["verdict"] == "not seen at this size"
    assert rows[STATISTICS["position"][0]]["verdict"] == "the opposite is seen"
    assert rows[STATISTICS["surprise"][0]]["verdict"] == ""
    assert "| −0.220 [" in table(list(rows.values()))
    assert verdict_of(Interval(0.3, None, None), +1, 0.1) == "too few seeds"


@pytest.mark.slow
def test_a_training_is_stopped_resumed_and_read(corpus_dir, tmp_path):
    arguments = [
        sys.executable, "-m", "bench", "findings", "--corpus", str(corpus_dir), "--seeds", "1", "--layers", "3",
        "--steps", "600", "--sequences", "4", "--runs", str(tmp_path / "runs"), "--evidence", str(tmp_path / "seeds"),
    ]  # fmt: skip

    def bench(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*arguments, *more], capture_output=True, text=True, check=False, cwd=ROOT,
                              env=os.environ | CPU, timeout=600)  # fmt: skip

    assert "has no finished seed; train with --hours" in bench().stderr
    for seconds in (20, 40, 80):  # until it ends in the middle of the training, not before
        done = bench("--hours", str(seconds / 3600))
        if "preempted" in done.stdout:
            break
    assert "seed 0: preempted" in done.stdout
    metrics = next((tmp_path / "runs").glob("*/metrics.jsonl"))
    before = metrics.read_text().splitlines()
    page = tmp_path / "page.md"
    page.write_text("<!-- findings --><!-- end of findings -->")
    done = bench("--hours", "1", "--plot", str(tmp_path / "plot.png"), "--page", str(page))
    assert done.returncode == 0, done.stdout + done.stderr
    assert metrics.read_text().splitlines()[: len(before)] == before  # it went on
    assert "rank correlation of K and position in the sequence" in page.read_text()
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    (kept,) = (tmp_path / "seeds").glob("*.json")
    read = json.loads(kept.read_text())
    assert len(read["experts_by_layer"]) == 40
    assert read["versions"].keys() == {"python", "torch", "commit"}
    before_second = page.read_text()
    done = bench("--seeds", "2", "--page", str(page))
    assert "1 of 2 seeds are finished: page and plot stay as they are" in done.stdout
    assert page.read_text() == before_second
    done = bench("--learning-rate", "1e-3")
    assert done.returncode == 2
    assert "use another directory for --evidence" in done.stderr

    model = open_trained(metrics.parent)
    data = PretrainingData([Corpus.open(corpus_dir)], model.config.data, 0, tmp_path / "index")
    tokens = read_tokens(model, data, 3)
    batch = data.validation_batch(range(3))
    length = batch.tokens_BS.shape[1]
    for row in range(3):
        with torch.no_grad():
            logits_SV = model.decoder(batch.tokens_BS[row : row + 1])[0]
            loss_S = F.cross_entropy(logits_SV, batch.labels_BS[row], reduction="none").numpy()
        own = slice(row * length, (row + 1) * length)
        np.testing.assert_allclose(tokens.next_loss_N[own], loss_S, rtol=1e-4, atol=1e-4)  # most are near 0 by then
        np.testing.assert_allclose(tokens.own_loss_N[own][1:], loss_S[:-1], rtol=1e-4, atol=1e-4)
        assert np.isnan(tokens.own_loss_N[own][0])
        assert tokens.ids_N[own].tolist() == batch.tokens_BS[row].tolist()
        assert tokens.position_N[own].tolist() == list(range(length))
    assert tokens.experts_N.min() >= 1
    assert tokens.experts_N.max() <= 16
