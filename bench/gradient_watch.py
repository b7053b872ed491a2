"""Benchmark 14: the cost of identifying the first non-finite gradient, in steps of two micro-batches.

"every pass" sums every gradient during the backward pass, which reads each once more. "watch" is our method: it does
nothing until a step is not finite. "a bad step" is such a step, which is skipped and recomputed for a description. The
models: the quickstart's, and one with 64 experts and few tokens, where gradients have the largest share. One rank.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.report import verdict
from dynmoe.config import load_config
from dynmoe.engines.nonfinite import GradientWatch
from dynmoe.model import Decoder
from dynmoe.ops.host_memory import keep_freed_memory
from harness.plans import DEVICE

_MODELS = {
    "quickstart": [],
    "64 experts, 256 tokens": ["model.moe.experts=64", "model.moe.expert_hidden=256", "train.micro_batch=1"],
}
_VOCAB = 4096
_MICRO_BATCHES = 2
_METHODS = ("nothing", "every pass", "watch", "a bad step")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", nargs="?", default="configs/quickstart.yaml", help="configuration of the model")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="fields to override, e.g. model.hidden=32")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")


def run(given: argparse.Namespace) -> list[dict[str, Any]]:
    torch.set_num_threads(given.threads)
    keep_freed_memory()
    rows = []
    for name, overrides in _MODELS.items():
        step = _stepper(given.config, [*overrides, *given.overrides])
        for method in _METHODS:
            step(method)
        ratios: dict[str, list[float]] = {method: [] for method in _METHODS[1:]}
        draw = random.Random(0)
        for _ in range(given.repeats):
            # In random order: the state of memory after one method can slow down the next.
            seconds = {method: step(method) for method in draw.sample(_METHODS, len(_METHODS))}
            for method, own in ratios.items():
                own.append(seconds[method] / seconds["nothing"])
        rows += [{"model": name, "method": m, "time_over_nothing": statistics.median(own)} for m, own in ratios.items()]
    return rows


def _stepper(path: str, overrides: list[str]) -> Callable[[str], float]:
    """Returns a function that takes one step by a method and returns its seconds."""
    config = load_config(path, overrides)
    model = Decoder(config.model, _VOCAB, seed=0).to(DEVICE)
    parameters = list(model.parameters())
    adam = torch.optim.AdamW(parameters, fused=True)
    watch = GradientWatch(model.named_parameters(), model.moe_layers)
    tokens = torch.randint(_VOCAB, (config.train.micro_batch, config.data.sequence_length + 1), device=DEVICE)
    sums: list[Tensor] = []

    def step(method: str) -> float:
        reads = parameters if method == "every pass" else []
        hooks = [own.register_hook(lambda gradient: sums.append(gradient.sum())) for own in reads]
        start = time.perf_counter()
        for number in range(_MICRO_BATCHES):
            with model.context.override(micro_batch=number):
                model(tokens[:, :-1], tokens[:, 1:]).backward()
        if method == "a bad step":
            with watch.watching():
                for number in range(_MICRO_BATCHES):
                    with model.context.override(micro_batch=number, recomputing=True):
                        torch.autograd.grad(model(tokens[:, :-1], tokens[:, 1:]), parameters, allow_unused=True)
            assert watch.first_bad_gradient() is None
        else:
            adam.step()
        adam.zero_grad()
        sums.clear()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        for hook in hooks:
            hook.remove()
        return seconds

    return step


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    return [
        verdict(f"{row['model']}: a step with the watch against one without", row["time_over_nothing"], 1.01)
        for row in rows
        if row["method"] == "watch"
    ]
