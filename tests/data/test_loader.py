"""Batches are read one step ahead: the same ones in the same order, and nothing of it outlives the run."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from dynmoe.config.sections import TrainConfig
from dynmoe.data.batches import Batch
from dynmoe.data.loader import Loader
from dynmoe.errors import UserError
from tests.data.test_batches import open_data

TRAIN = TrainConfig(global_batch=4, micro_batch=1)
PATIENCE_S = 10.0


class Noting:
    """Stands in for the data: a sample is its number, and who read what when is on record."""

    def __init__(self, damaged: int | None = None) -> None:
        self.damaged = damaged
        self.prepared: list[tuple[int, str]] = []
        self.read: list[int] = []
        self.readers: set[str] = set()
        self.began = threading.Event()

    def prepare(self, first: int, count: int) -> None:
        self.prepared.append((first, threading.current_thread().name))

    def train_batch(self, samples: range) -> Batch:
        self.began.set()
        self.readers.add(threading.current_thread().name)
        self.read += samples
        if self.damaged in samples:
            raise UserError(f"sample {self.damaged} is damaged")
        return Batch(torch.tensor([*samples]), torch.tensor([*samples]))


def loader(data: object, rank: int = 0, ranks: int = 1, pin: bool = False) -> Loader:
    return Loader(data, TRAIN, rank, ranks, pin)  # type: ignore[arg-type]


def loader_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("loader")]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert loader_threads() == []


def test_the_next_step_is_read_while_a_step_computes_and_no_later_one():
    data = Noting()
    ahead = loader(data)
    ahead.take(0, continues=False)
    data.began.clear()
    ahead.take(4, continues=True)  # returns with step 4 read; the step computes from here on
    assert data.began.wait(PATIENCE_S)
    _, batches = ahead.take(8, continues=False)
    assert [int(batch.tokens_BS) for batch in batches] == [8, 9, 10, 11]
    assert data.read == [*range(12)], "what does not go on reads nothing more"
    ahead.close()


def test_a_step_does_not_wait_for_the_next_one_and_closing_does():
    data = Noting()
    plain = data.train_batch
    reads = threading.Event()
    read_on = threading.Event()

    def train_batch(samples: range) -> Batch:
        if samples.start == 4:
            reads.set()
            assert read_on.wait(PATIENCE_S)
        return plain(samples)

    data.train_batch = train_batch  # type: ignore[method-assign]
    ahead = loader(data)
    ahead.take(0, continues=True)
    assert data.read == [*range(4)]
    assert reads.wait(PATIENCE_S), "what has not begun is not read any more"
    timer = threading.Timer(0.05, read_on.set)
    timer.start()
    ahead.close()
    assert data.read == [*range(8)]
    timer.join()


def test_ranks_share_the_samples_of_a_step_in_turn():
    steps = [loader(Noting(), rank, ranks=2) for rank in range(2)]
    samples = [own.take(8, continues=False)[0] for own in steps]
    assert samples == [[range(8, 9), range(10, 11)], [range(9, 10), range(11, 12)]]
    for own in steps:
        own.close()


def test_collectives_stay_on_the_callers_thread_and_reading_off_it():
    data = Noting()
    ahead = loader(data)
    for first in (0, 4, 8):
        ahead.take(first, continues=first < 8)
    ahead.close()
    here = threading.current_thread().name
    assert data.prepared == [(0, here), (4, here), (8, here)], "once for each step, in their order"
    assert here not in data.readers
    assert len(data.readers) == 1


def test_what_reading_raises_comes_out_at_the_step_that_needs_it():
    ahead = loader(Noting(damaged=6))
    assert len(ahead.take(0, continues=True)[1]) == 4
    with pytest.raises(UserError, match="sample 6 is damaged"):
        ahead.take(4, continues=True)
    ahead.close()


def test_batches_are_pinned_by_the_thread_that_reads_them(monkeypatch):
    pinned = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(threading.current_thread().name)
        return tensor + 100

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    ahead = loader(Noting(), pin=True)
    _, batches = ahead.take(0, continues=False)
    ahead.close()
    assert [int(batch.tokens_BS) for batch in batches] == [int(batch.labels_BS) for batch in batches]
    assert [int(batch.tokens_BS) for batch in batches] == [100, 101, 102, 103]
    assert {name.startswith("loader") for name in pinned} == {True}


def test_order_and_resume_over_the_end_of_a_pass(corpus_dir: Path, tmp_path: Path):
    """Against the data read step by step on one thread; the second start continues where the first ended."""
    plain = open_data([corpus_dir], tmp_path / "plain")
    begin = plain.samples_per_epoch - 6
    expected = []
    for first in range(begin, begin + 20, 4):
        plain.prepare(first, 4)
        expected += [plain.train_batch(range(number, number + 1)).tokens_BS for number in range(first, first + 4)]
    found = []
    for start, steps in ((begin, 2), (begin + 8, 3)):
        ahead = loader(open_data([corpus_dir], tmp_path / f"{start}"))
        for step in range(steps):  # the first start ends with a step read ahead, which is lost
            found += [batch.tokens_BS for batch in ahead.take(start + 4 * step, continues=True)[1]]
        ahead.close()
    assert len(found) == len(expected) == 20
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
