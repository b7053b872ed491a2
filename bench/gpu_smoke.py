"""Both engines on one device in bf16: equal losses, tokens per second, TFLOP/s of the activated experts."""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from typing import Any

import torch

from dynmoe.config import Config, load_config
from dynmoe.data.batches import Batch
from dynmoe.engines import make_engine
from dynmoe.errors import UserError
from dynmoe.model import ModelSize
from dynmoe.ops.host_memory import keep_freed_memory
from dynmoe.train.engine import take_step
from dynmoe.train.metrics import peak_memory_gib

_VOCAB = 32000
_AGREEMENT = 0.01
# A model that fills a GPU, and a similar one for a CPU.
_LARGE = {"layers": 12, "hidden": 1024, "heads": 16, "experts": 16, "width": 1408, "length": 1024, "batch": 8}
_SMALL = {"layers": 2, "hidden": 64, "heads": 4, "experts": 4, "width": 64, "length": 64, "batch": 4}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    sizes = _LARGE if torch.cuda.is_available() else _SMALL
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--router", default="top_p", help="model.router.kind")


def run(given: argparse.Namespace) -> list[dict[str, Any]]:
    keep_freed_memory()
    results = {engine: _train(_config(given, engine)) for engine in ("deepspeed", "megatron")}
    losses = [rows.pop("losses") for rows in results.values()]
    difference = max(abs(a - b) / abs(a) for a, b in zip(*losses, strict=True))
    if difference > _AGREEMENT:
        raise UserError(f"losses of the two engines differ by {difference:.2%}, more than {_AGREEMENT:.0%}")
    print(f"losses of the two engines agree within {difference:.2%} over {given.steps} steps")
    return list(results.values())


def _config(given: argparse.Namespace, engine: str) -> Config:
    return load_config(None, [
        f"engine={engine}", "train.precision=bf16", f"train.steps={given.steps}", f"train.global_batch={given.batch}",
        f"train.micro_batch={given.micro_batch}", f"data.sequence_length={given.length}", "optimizer.lr=1e-3",
        f"model.layers={given.layers}", f"model.hidden={given.hidden}", f"model.heads={given.heads}",
        f"model.kv_heads={given.heads}", f"model.moe.experts={given.experts}", f"model.moe.expert_hidden={given.width}",
        f"model.router.kind={given.router}",
    ])  # fmt: skip


def _batches(config: Config, step: int) -> list[Batch]:
    """Sequences that count up from random numbers, the same for both engines and learnable."""
    generator = torch.Generator().manual_seed(step)
    rows = config.train.global_batch
    length = config.data.sequence_length
    start = torch.randint(_VOCAB, (rows, 1), generator=generator)
    tokens = (start + torch.arange(length + 1)) % _VOCAB
    return [Batch(part[:, :-1], part[:, 1:]) for part in tokens.split(config.train.micro_batch)]


def _train(config: Config) -> dict[str, Any]:
    """Losses of every step, and figures of the steps after the first tenth."""
    engine = make_engine(config, _VOCAB)
    cuda = engine.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    size = ModelSize(config.model, _VOCAB, config.data.sequence_length)
    losses = []
    speeds = []
    tflops = []
    experts = []
    for step in range(config.train.steps):
        batches = _batches(config, step)
        start = time.perf_counter()
        gradients, _ = take_step(engine, batches, config.optimizer.lr)
        report = engine.report()  # synchronizes with the device
        seconds = time.perf_counter() - start
        losses.append(gradients.lm_loss)
        if step < config.train.steps // 10:
            continue
        rows = sum(report.routed_rows.values())
        speeds.append(config.tokens_per_step / seconds)
        tflops.append(size.flops(config.tokens_per_step, rows) / seconds / 1e12)
        experts.append(rows / config.tokens_per_step / len(config.model.moe_layers))
    row = {
        "benchmark": "gpu_smoke", "method": config.engine, "parameters_millions": size.total_parameters / 1e6,
        "tokens_per_s": statistics.median(speeds), "tflops": statistics.median(tflops),
        "experts_per_token": statistics.mean(experts), "first_loss": losses[0], "last_loss": losses[-1],
        "losses": losses,
    }  # fmt: skip
    if cuda:  # on a CPU the resident memory of a process only grows, so it does not compare engines
        row["peak_memory_gib"] = peak_memory_gib()
    del engine
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
    return row
