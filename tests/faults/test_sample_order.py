"""F12: the sample order across kills, epochs and world sizes."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests.faults.test_corpora import store
from tests.train.cases import TrainingProcess

LENGTH = 32
SAMPLES = 70  # per epoch; 40 steps of 4 samples are two epochs and a part of the third
TWO = ["parallel.expert=2"]
ONE = ["parallel.expert=1"]


@pytest.fixture(scope="module")
def sequences() -> np.ndarray:
    return np.random.default_rng(5).integers(5, 400, (SAMPLES, LENGTH))


@pytest.fixture(scope="module")
def small_corpus(corpus_dir, tmp_path_factory, sequences) -> Path:
    """A corpus with one document of SAMPLES sequences and the label of the last token."""
    corpus = Path(shutil.copytree(corpus_dir, tmp_path_factory.mktemp("small") / "prepared"))
    store(corpus, "train", [*sequences.flatten().tolist(), 5])
    return corpus


def samples(run: Path, count: int = 40) -> list[list[tuple[int, tuple[int, ...]]]]:
    """Number and tokens of the samples of each of ``count`` steps, from the traces of the first layer."""
    traced = pd.read_parquet(run / "traces")
    traced = traced[traced["layer"] == 0].sort_values(["step", "sample", "position"])
    assert traced.groupby(["step", "sample"])["position"].apply(list).map(lambda own: own == [*range(LENGTH)]).all()
    tokens = traced.groupby(["step", "sample"])["token"].apply(tuple)
    steps = sorted(traced["step"].unique())
    assert steps == [*range(1, count + 1)]
    return [[(int(number), own) for number, own in tokens[step].items()] for step in steps]


@pytest.mark.slow  # the order itself: tests/data/test_batches.py; other layouts: test_f19 of the engines
def test_f12_sample_order_after_kills_over_epochs_on_other_world_sizes(small_corpus, tmp_path, sequences):
    """Two ranks, one rank, and two ranks again, with kills in the first and in the second epoch."""
    fields = ["logging.trace_interval=1", "checkpoint.interval=5"]
    runs = tmp_path / "runs"
    killed = tmp_path / "killed"
    whole = TrainingProcess(small_corpus, runs, *fields, *TWO)
    for overrides, ranks, step in ((TWO, 2, 13), (ONE, 1, 28)):
        process = TrainingProcess(small_corpus, killed, *fields, *overrides, ranks=ranks)
        process.wait_for_row(killed / "tiny" / "metrics.jsonl", step)
        process.kill_tree()
    last = TrainingProcess(small_corpus, killed, *fields, *TWO)
    for process in (whole, last):
        assert process.wait() == 0, process.output()

    order = samples(killed / "tiny")
    assert order == samples(runs / "tiny")
    seen = [sample for step in order for sample in step]
    assert [number for number, _ in seen] == [*range(160)], "a sample was repeated or skipped"
    epochs = [[own for number, own in seen if number // SAMPLES == epoch] for epoch in range(3)]
    corpus = sorted(map(tuple, sequences.tolist()))
    assert sorted(epochs[0]) == sorted(epochs[1]) == corpus, "an epoch does not have each sequence once"
    assert epochs[0] != epochs[1]
    assert set(epochs[2]) < set(corpus)
    assert len(set(epochs[2])) == 160 - 2 * SAMPLES
