from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dynmoe.data.indexed import check_indexed
from dynmoe.data.order import open_samples
from tests.data.megatron_order import megatron_samples, write_corpus

LENGTHS = {
    "documents": [1 + 37 * number % 90 for number in range(200)],
    "long": [500, 3, 700],
    "one": [33],
    "exact": [32, 32, 1],
}


def all_samples(*arguments) -> np.ndarray:
    """All samples with the token after each."""
    samples = open_samples(*arguments)
    read = [samples.sequence(index, eod=-1) for index in range(len(samples))]
    return np.stack([np.append(own.tokens_S, own.labels_S[-1]) for own in read])


@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize("seed", [0, 7])
def test_a_corpus_is_read_in_megatrons_order(name, seed, tmp_path):
    prefix = write_corpus(tmp_path / name, LENGTHS[name], seed)
    ours = all_samples([check_indexed(prefix)], 32, seed, tmp_path / "ours")
    theirs = megatron_samples([prefix], 32, seed, tmp_path / "theirs")
    assert len(theirs) == (sum(LENGTHS[name]) - 1) // 32
    np.testing.assert_array_equal(ours, theirs)


def both_blends(folder: Path, lengths: list[list[int]], weights: list[float] | None, size: int | None):
    prefixes = [write_corpus(folder / f"corpus_{n}", own, n) for n, own in enumerate(lengths)]
    splits = [check_indexed(prefix) for prefix in prefixes]
    ours = all_samples(splits, 32, 5, folder / "ours", weights, size)
    again = all_samples(splits, 32, 5, folder / "ours", weights, size)  # from the files
    return ours, again, megatron_samples(prefixes, 32, 5, folder / "theirs", weights, size)


@pytest.mark.parametrize(
    ("names", "weights", "size"),
    [
        (["documents", "long", "one"], None, None),
        (["documents", "long"], [0.75, 0.25], 150),  # 113 and 38 samples: the second corpus needs a second epoch
        (["documents", "one"], [0.99, 0.01], 100),
        (["one", "exact"], [0.5, 0.5], 9),  # five epochs of the first, three of the second
        (["long", "documents"], [0.9, 0.1], 90),  # most of a third epoch: not shuffled on its own
    ],
)
def test_a_blend_is_read_in_megatrons_order(names, weights, size, tmp_path, one_rank):
    ((ours, again, theirs),) = one_rank.run(both_blends, tmp_path, [LENGTHS[name] for name in names], weights, size)
    assert len(theirs) >= (size or 1)
    np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(again, theirs)


def test_other_seeds_lengths_and_corpora_have_other_files(tmp_path):
    prefixes = [write_corpus(tmp_path / name, LENGTHS[name], 0) for name in ("documents", "long")]
    for prefix in prefixes:
        for seed, length in ((0, 32), (1, 32), (0, 16)):
            ours = all_samples([check_indexed(prefix)], length, seed, tmp_path / "cache")
            np.testing.assert_array_equal(ours, megatron_samples([prefix], length, seed, tmp_path / "theirs"))
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 18


def test_one_corpus_needs_no_megatron(corpus_dir, tmp_path):
    """Its import would take most of the time before the first step."""
    script = (
        "import sys; from pathlib import Path; from dynmoe.config import DataConfig as C; "
        "from dynmoe.data.batches import PretrainingData as D; from dynmoe.data.corpus import open_corpora; "
        f"D(open_corpora([{str(corpus_dir)!r}], 32), C(), 0, Path({str(tmp_path)!r})).train_batch(range(1)); "
        "assert 'megatron' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
