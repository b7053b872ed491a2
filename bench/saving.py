"""Benchmark 11: training steps during an asynchronous save, compared with the same steps without.

One rank. A save begins, steps continue until it is committed, verified and pruned, and as many steps follow without a
save; then the next save begins. "first step" starts the save and includes the copy of the state. "at once" is the time
of the same save if the run waits for it.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from bench.report import Rows, verdict
from dynmoe.config import load_config
from dynmoe.data.batches import Batch
from dynmoe.train.engine import Engine, take_step
from harness.processes import join_ranks

_ENGINES = ("deepspeed", "megatron")
_VOCAB = 4096


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", nargs="?", default="configs/quickstart.yaml", help="configuration of the model")
    parser.add_argument("overrides", nargs="*", help="fields to override, e.g. model.hidden=256")
    parser.add_argument("--engines", nargs="*", default=list(_ENGINES), choices=_ENGINES)
    parser.add_argument("--saves", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads for the steps")


def run(given: argparse.Namespace) -> Rows:
    rows = []
    for engine in given.engines:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(_serve, (given, engine, Path(folder)), nprocs=1)
            rows.append(torch.load(Path(folder) / "row.pt"))
    return rows


def _serve(_: int, given: argparse.Namespace, name: str, folder: Path) -> None:
    from dynmoe.engines import make_engine
    from dynmoe.ops.host_memory import keep_freed_memory

    torch.set_num_threads(given.threads)
    keep_freed_memory()
    join_ranks(0, 1, folder)
    config = load_config(given.config, [f"engine={name}", "parallel.expert=1", *given.overrides])
    engine = make_engine(config, _VOCAB)
    tokens = torch.randint(_VOCAB, (config.train.micro_batch, config.data.sequence_length + 1))
    measured = _Measured(engine, Batch(tokens[:, :-1], tokens[:, 1:]), config.optimizer.lr, folder / "checkpoints")
    torch.save({"engine": name, **measured.figures(given.saves)}, folder / "row.pt")
    dist.destroy_process_group()


class _Measured:
    """Steps of an engine, and saves during and between them.

    Args:
        engine: engine to step.
        batch: batch of every step.
        lr: learning rate.
        root: directory for the checkpoints; one is kept.
    """

    def __init__(self, engine: Engine, batch: Batch, lr: float, root: Path) -> None:
        from dynmoe.train.checkpoint_store import CheckpointStore

        self._engine = engine
        self._batch = batch
        self._lr = lr
        self._store = CheckpointStore(root, keep=1)

    def figures(self, saves: int) -> dict[str, Any]:
        for _ in range(5):
            self._step()
        self._save()
        self._store.wait()
        during = []
        first = []
        whole = []
        at_once = []
        lengths = []
        for _ in range(saves):
            self._step()  # so that each save is of a different step
            saving = self._steps_of_a_save()
            plain = [self._step() for _ in saving]
            step = statistics.median(plain)
            first.append(saving[0] / step)
            during.append(statistics.median(saving[1:]) / step)
            whole.append(sum(saving) / sum(plain))
            lengths.append(len(saving))
            start = time.perf_counter()
            self._save()
            self._store.wait()
            at_once.append((time.perf_counter() - start) / step)
        (saved,) = self._store.root.iterdir()
        size = sum(file.stat().st_size for file in saved.rglob("*") if file.is_file())
        shutil.rmtree(self._store.root)
        return {
            "checkpoint_bytes": size, "steps of a save": statistics.median(lengths),
            "step while saving": statistics.median(during), "first step": statistics.median(first),
            "all steps of a save": statistics.median(whole), "at once, in steps": statistics.median(at_once),
        }  # fmt: skip

    def _steps_of_a_save(self) -> list[float]:
        """Seconds of the steps from the beginning to the end of a save, as taken by the trainer."""
        start = time.perf_counter()
        self._save()
        begun = time.perf_counter() - start
        seconds: list[float] = []
        while self._store.saving or len(seconds) < 2:
            own = self._step()
            start = time.perf_counter()
            if self._store.saving and not self._store.busy:
                self._store.advance()
            seconds.append(own + begun + time.perf_counter() - start)
            begun = 0.0
        return seconds

    def _save(self) -> None:
        self._store.begin(self._engine.step, self._engine.snapshot, {}, {})

    def _step(self) -> float:
        start = time.perf_counter()
        take_step(self._engine, [self._batch], self._lr)
        if self._engine.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start


def verdicts(rows: Rows) -> list[str]:
    return [
        verdict(f"{row['engine']}: {what} against one without", row[what], 1.1)
        for row in rows
        for what in ("step while saving", "all steps of a save")
    ]
