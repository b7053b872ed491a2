from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch

from data_prep.build import build
from data_prep.recipe import Recipe
from dynmoe.config import DataConfig
from dynmoe.config.constants import IGNORED
from dynmoe.data.batches import PretrainingData
from dynmoe.data.corpus import open_corpora
from dynmoe.errors import UserError
from tests.texts import write_texts

LENGTH = 32


def open_data(directories, cache, weights=(), seed=0, **settings) -> PretrainingData:
    dirs = [str(directory) for directory in directories]
    return PretrainingData(open_corpora(dirs, LENGTH), DataConfig(dirs, list(weights), LENGTH, **settings), seed, cache)


@pytest.fixture(scope="module")
def second_corpus(tmp_path_factory, corpus_dir):
    root = tmp_path_factory.mktemp("second")
    (root / "text").mkdir()
    (root / "text" / "a.txt").write_text("zzzz yyyy xxxx\n" * 400)
    (root / "text" / "b.txt").write_text("zzzz yyyy wwww\n" * 400)
    (root / "text" / "c.txt").write_text("zzzz yyyy vvvv\n" * 400)
    recipe = Recipe([str(root / "text")], tokenizer=str(corpus_dir / "tokenizer.model"), validation_fraction=0.5)
    build(recipe, root / "prepared", workers=1)
    return root / "prepared"


def test_labels_are_the_next_tokens(corpus_dir, tmp_path):
    data = open_data([corpus_dir], tmp_path)
    data.prepare(0, 4)
    batch = data.train_batch(range(4))
    assert batch.tokens_BS.shape == (4, LENGTH)
    assert torch.equal(batch.tokens_BS[:, 1:], batch.labels_BS[:, :-1])


def test_documents_start_with_the_end_of_text_token_before_them(corpus_dir, tmp_path):
    data = open_data([corpus_dir], tmp_path, documents="masked")
    size = data.samples_per_epoch
    batch = data.train_batch(range(size))
    joined = open_data([corpus_dir], tmp_path).train_batch(range(size))
    assert joined.start_BS is None
    assert torch.equal(joined.tokens_BS, batch.tokens_BS)
    assert torch.equal(joined.labels_BS, batch.labels_BS)
    for tokens, starts in zip(batch.tokens_BS.tolist(), batch.start_BS.tolist(), strict=True):
        start = 0
        for place, token in enumerate(tokens):
            start = place if token == data.tokenizer.eod else start
            assert starts[place] == start
    assert batch.start_BS.unique().numel() > 10
    part = batch.at(torch.tensor([5, 6]))
    assert torch.equal(part.tokens_BS, batch.tokens_BS[:, 5:7])
    assert torch.equal(part.labels_BS, batch.labels_BS[:, 5:7])
    assert torch.equal(part.start_BS, batch.start_BS)


def test_the_first_token_of_a_document_may_be_left_out_of_the_loss(corpus_dir, tmp_path):
    data = open_data([corpus_dir], tmp_path, documents="masked")
    size = data.samples_per_epoch
    everything = data.train_batch(range(size))
    begins = everything.tokens_BS == data.tokenizer.eod
    data.settle(dataclasses.replace(data.settings, predict_first_token=False))
    labels = data.train_batch(range(size)).labels_BS
    assert begins.any()
    assert torch.equal(labels, everything.labels_BS.masked_fill(begins, IGNORED))


@pytest.mark.parametrize("split", ["train", "validation"])
def test_documents_without_an_end_cannot_be_masked(corpus_dir, tmp_path, split):
    from tests.faults.test_corpora import store

    copy = tmp_path / "corpus"
    shutil.copytree(corpus_dir, copy)
    store(copy, split, [5] * 100)
    with pytest.raises(
        UserError, match=rf"data\.documents=masked: the documents of {copy / split} do not end .* use data"
    ):
        open_data([copy], tmp_path, documents="masked")
    open_data([copy], tmp_path)


def test_a_pass_shows_every_sample_once_and_the_next_in_another_order(corpus_dir, tmp_path):
    data = open_data([corpus_dir], tmp_path)
    data.prepare(0, 1)
    size = data.samples_per_epoch
    data.prepare(0, 2 * size)
    tokens = [tuple(data.train_batch(range(n, n + 1)).tokens_BS[0].tolist()) for n in range(2 * size)]
    first = tokens[:size]
    second = tokens[size:]
    # Both passes hold all the text; sequences are cut at other places, since documents come in another order.
    assert len(set(first)) == size
    assert first != second


def test_the_order_is_the_same_after_a_restart_and_across_the_end_of_a_pass(corpus_dir, tmp_path):
    data = open_data([corpus_dir], tmp_path / "a")
    data.prepare(0, 1)
    size = data.samples_per_epoch
    first = size - 3
    data.prepare(first, 6)
    straight = data.train_batch(range(first, first + 6))
    resumed = open_data([corpus_dir], tmp_path / "b")
    resumed.prepare(first, 6)
    assert torch.equal(resumed.train_batch(range(first, first + 6)).tokens_BS, straight.tokens_BS)
    later = open_data([corpus_dir], tmp_path / "a")
    later.prepare(first + 3, 3)
    assert torch.equal(later.train_batch(range(first + 3, first + 6)).tokens_BS, straight.tokens_BS[3:])


def test_a_batch_may_span_several_epochs(corpus_dir, tmp_path):
    data = open_data([corpus_dir], tmp_path / "a")
    data.prepare(0, 1)
    count = 2 * data.samples_per_epoch + 2
    data.prepare(0, count)
    whole = data.train_batch(range(count)).tokens_BS
    other = open_data([corpus_dir], tmp_path / "b")
    other.prepare(count - 1, 1)
    assert torch.equal(other.train_batch(range(count - 1, count)).tokens_BS[0], whole[-1])


def test_seeds_give_other_orders(corpus_dir, tmp_path):
    batches = []
    for seed in (0, 0, 1):
        data = open_data([corpus_dir], tmp_path / f"{seed}", seed=seed)
        data.prepare(0, 8)
        batches.append(data.train_batch(range(8)).tokens_BS)
    assert torch.equal(batches[0], batches[1])
    assert not torch.equal(batches[0], batches[2])


def read_blend(directories: list[str], cache: str) -> tuple[list[list[int]], list[int]]:
    """One epoch of a blend of 3 : 1, and the tokens that only the second corpus has. Needs a process group."""
    data = open_data(directories, Path(cache), weights=[3, 1])
    data.prepare(0, 1)
    marker = set(data.tokenizer.encode("zzzz")) - set(data.tokenizer.encode("The router takes 1 of the gates."))
    return data.train_batch(range(data.samples_per_epoch)).tokens_BS.tolist(), sorted(marker)


def test_a_blend_keeps_its_weights(corpus_dir, second_corpus, tmp_path, one_rank):
    ((rows, marker),) = one_rank.run(read_blend, [str(corpus_dir), str(second_corpus)], str(tmp_path))
    assert len(rows) > 40
    from_second = sum(bool(set(marker) & set(row)) for row in rows)
    assert from_second / len(rows) == pytest.approx(0.25, abs=0.03)


def test_corpora_that_do_not_fit_are_refused(corpus_dir, tmp_path):
    with pytest.raises(UserError, match="holds no prepared corpus"):
        open_corpora([str(tmp_path)], LENGTH)
    with pytest.raises(UserError, match=r"data\.sequence_length=10000000"):
        open_corpora([str(corpus_dir)], 10_000_000)
    write_texts(tmp_path / "text", documents=30)
    build(Recipe([str(tmp_path / "text")], vocab_size=350, validation_fraction=0.2), tmp_path / "other", workers=1)
    with pytest.raises(UserError, match="a different tokenizer"):
        open_corpora([str(corpus_dir), str(tmp_path / "other")], LENGTH)
