"""Benchmark 8: training steps on two ranks: dynamic routing held at K = 2, compared with top-2, in both engines.

The same model (except for the router), initial weights, data, order and optimizer. The methods take turns, one step
each, so that disturbances affect all of them. deepspeed_top2 is DeepSpeed's own MoE layer without drops, in its own
engine; only its gate starts from other weights. deepspeed_autoep is transformers' Mixtral, trained by DeepSpeed's
AutoEP (with transformers before 5.23); its balance loss pools the layers. The others are ours. Tokens per second are
those of the median step. The median ratio lies between at_least and at_most with 95 % confidence (by order statistics).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from bench import deepspeed_peers
from bench.deepspeed_peers import TrainStep
from bench.report import verdict, verdict_at_least
from bench.timing import median_interval
from dynmoe.config import Config, load_config
from dynmoe.data.batches import Batch
from dynmoe.errors import UserError
from dynmoe.train.engine import take_step
from harness.processes import join_ranks

# DeepSpeed normalizes a token's gates to sum 1, so ours do too here: this affects how fast a short run learns.
_HELD_TOP_P = ["model.router.kind=top_p", "model.router.renormalize=true", "budget.method=pi",
               "budget.experts_per_token=2"]  # fmt: skip
_TOP_2 = ["model.router.kind=top_k", "model.router.renormalize=true", "model.router.k=2"]
METHODS = {
    "deepspeed_top2": ["engine=deepspeed", *_TOP_2],
    "deepspeed_autoep": ["engine=deepspeed", *_TOP_2],
    "top_p, deepspeed": ["engine=deepspeed", *_HELD_TOP_P],
    "top_k, deepspeed": ["engine=deepspeed", *_TOP_2],
    "top_p, megatron": ["engine=megatron", *_HELD_TOP_P],
    "top_k, megatron": ["engine=megatron", *_TOP_2],
}


_OVER_AUTOEP = 1.3
_PEERS = {"deepspeed_top2": deepspeed_peers.own_layers, "deepspeed_autoep": deepspeed_peers.mixtral}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", nargs="?", default="configs/quickstart.yaml", help="configuration of model and data")
    parser.add_argument("overrides", nargs="*", help="fields to override, e.g. model.hidden=256")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--ranks", type=int, default=2)


def run(given: argparse.Namespace) -> list[dict[str, Any]]:
    configs = {name: _config(given, name) for name in given.methods}  # reports errors before any process starts
    if "deepspeed_autoep" in given.methods:
        deepspeed_peers.check_versions()
    missing = [path for path in next(iter(configs.values())).data.dirs if not Path(path).exists()]
    if missing:
        raise UserError(f"data.dirs={missing}: does not exist; run python -m data_prep stdlib --out {missing[0]}")
    if torch.cuda.is_available() and given.ranks > torch.cuda.device_count():
        raise UserError(f"--ranks={given.ranks}: exceeds the {torch.cuda.device_count()} GPUs; use fewer, or set "
                        "CUDA_VISIBLE_DEVICES= to run on the CPU")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_serve, (given, folder), nprocs=given.ranks)
        seen: dict[str, dict[str, list[float]]] = torch.load(Path(folder) / "0.pt")
    reference = seen[given.methods[0]]["seconds"]
    rows = []
    for name, figures in seen.items():
        seconds = figures["seconds"]
        config = configs[name]
        ratios = [own / first for own, first in zip(seconds, reference, strict=True)]
        low, high = median_interval(ratios)
        rows.append({
            "method": name, "router": config.model.router.kind,
            "experts_per_token": statistics.mean(figures["experts"]),
            "tokens_per_s": round(config.tokens_per_step / statistics.median(seconds)),
            "time_over_first": statistics.median(ratios), "at_least": low, "at_most": high,
            "moe_share": statistics.median(figures["moe_share"]),
            "loss_at_end": statistics.mean(figures["losses"][-5:]),
            "curve": [list(point) for point in zip(accumulate(seconds), figures["losses"], strict=True)],
        })  # fmt: skip
    return rows


def _config(given: argparse.Namespace, method: str) -> Config:
    return load_config(given.config, [
        *METHODS[method], f"train.steps={given.steps}", f"parallel.expert={given.ranks}", "train.global_batch=16",
        f"train.micro_batch={16 // given.ranks}", "schedule.warmup_steps=10", *given.overrides,
    ])  # fmt: skip


def _serve(rank: int, given: argparse.Namespace, folder: str) -> None:
    """Runs on each rank: all methods, in turn step by step."""
    from dynmoe.data.batches import PretrainingData
    from dynmoe.data.corpus import open_corpora
    from dynmoe.ops.host_memory import keep_freed_memory
    from dynmoe.train.schedule import learning_rate

    torch.set_num_threads(1)
    keep_freed_memory()
    join_ranks(rank, given.ranks, Path(folder))
    configs = {name: _config(given, name) for name in given.methods}
    first = next(iter(configs.values()))
    corpora = open_corpora(first.data.dirs, first.data.sequence_length)
    vocab_size = first.model.embedding_rows(corpora[0].tokenizer.vocab_size)
    data = PretrainingData(corpora, first.data, first.train.seed, Path(folder) / "index")
    runs = {name: _Run(config, vocab_size, name) for name, config in configs.items()}
    for step in range(1, given.steps + 1):
        start = (step - 1) * first.train.global_batch
        data.prepare(start, first.train.global_batch)
        micro = first.train.micro_batch
        batch = data.train_batch(range(start + rank * micro, start + (rank + 1) * micro))
        lr = learning_rate(step, given.steps, first.optimizer, first.schedule)
        for own in runs.values():
            own.step(batch, lr)
    if rank == 0:
        torch.save({name: own.figures() for name, own in runs.items()}, Path(folder) / "0.pt")
    dist.barrier()
    dist.destroy_process_group()


class _Run:
    """The training of one method: seconds, loss and experts per token of each step."""

    def __init__(self, config: Config, vocab_size: int, name: str) -> None:
        build = _PEERS.get(name, _ours)
        self._train_step, layers = build(config, vocab_size)
        self._clock = _Clock(layers)
        self.steps: list[tuple[float, float, float, float]] = []

    def step(self, batch: Batch, lr: float) -> None:
        dist.barrier()
        self._clock.seconds = 0.0
        start = time.perf_counter()
        loss, experts = self._train_step(batch, lr)
        seconds = time.perf_counter() - start
        self.steps.append((seconds, self._clock.seconds / seconds, loss, experts))

    def figures(self) -> dict[str, list[float]]:
        """Without the first tenth of the steps, in which allocators and controllers settle."""
        seconds, shares, losses, experts = zip(*self.steps[len(self.steps) // 10 :], strict=True)
        return {"seconds": [*seconds], "moe_share": [*shares], "losses": [*losses], "experts": [*experts]}


class _Clock:
    """Seconds spent in layers, forward and backward, on the host's clock: exact on a CPU."""

    def __init__(self, layers: list[nn.Module]) -> None:
        self.seconds = self._start = 0.0
        for layer in layers:
            layer.register_forward_pre_hook(self._begin)
            layer.register_forward_hook(self._end)
            layer.register_full_backward_pre_hook(self._begin)
            layer.register_full_backward_hook(self._end)

    def _begin(self, *_: object) -> None:
        self._start = time.perf_counter()

    def _end(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._start


def _ours(config: Config, vocab_size: int) -> tuple[TrainStep, list[nn.Module]]:
    """A step of one of our engines."""
    from dynmoe.engines import make_engine

    engine = make_engine(config, vocab_size)

    def step(batch: Batch, lr: float) -> tuple[float, float]:
        gradients, _ = take_step(engine, [batch], lr)
        report = engine.report()
        return gradients.lm_loss, statistics.mean(report.routed_rows.values()) / config.tokens_per_step

    return step, list(engine.layers)  # type: ignore[attr-defined]


def plot(rows: list[dict[str, Any]], axes: Any) -> None:
    for row in rows:
        axes.plot(*zip(*row["curve"], strict=True), label=row["method"])
    axes.set(xlabel="seconds", ylabel="training loss, nats per token")
    axes.legend(fontsize=7)


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    first = rows[0]["method"]
    ours = [row for row in rows if row["router"] == "top_p"]
    said = [verdict(f"{row['method']}: time of a step over {first}", row["time_over_first"], 1.0) for row in ours]
    speeds = {row["method"]: row["tokens_per_s"] for row in rows}
    if "deepspeed_autoep" in speeds and "top_p, deepspeed" in speeds:
        ratio = speeds["top_p, deepspeed"] / speeds["deepspeed_autoep"]
        said.append(verdict_at_least("top_p, deepspeed: tokens/s over deepspeed_autoep", ratio, _OVER_AUTOEP))
    return said
