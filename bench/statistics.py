"""Benchmark 10: a training step with MoE statistics and their views, compared with the same step without.

A run pays this only on logged steps; here every step is one, with histograms. W&B's server does not answer, so W&B logs
offline, as in a run with a dead address.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import socket
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bench.report import verdict
from dynmoe.config import Config, load_config
from dynmoe.model import Decoder
from dynmoe.ops.host_memory import keep_freed_memory
from dynmoe.train.engine import StepReport
from dynmoe.train.metrics import View, histograms, moe_row
from dynmoe.train.run_directory import RunDirectory


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", nargs="?", default="configs/quickstart.yaml", help="configuration of the model")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")


def run(given: argparse.Namespace) -> list[dict[str, Any]]:
    # Imported here, because other benchmarks do not need these packages.
    from dynmoe.train.tensorboard_view import TensorBoardView
    from dynmoe.train.wandb_view import WandbView

    torch.set_num_threads(given.threads)
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder, socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        os.environ |= {"WANDB_BASE_URL": f"http://127.0.0.1:{deaf.getsockname()[1]}", "WANDB_API_KEY": "0" * 40}
        config = load_config(given.config, [f"run.dir={folder}", "logging.wandb=online"])
        directory = RunDirectory(config.run.path)
        directory.path.mkdir()
        directory.begin(config.to_yaml(), {})
        views: dict[str, View | None] = {
            "statistics": None,
            "statistics, TensorBoard": TensorBoardView(Path(folder) / "tensorboard", 0),
            "statistics, W&B": WandbView(config, directory, lambda path: {}, None),
        }
        ratios = _measure(config, views, given.repeats)
        for view in views.values():
            if view is not None:
                view.close()
    return [
        {"benchmark": "statistics", "method": name, "dtype": "fp32", "ratio_on_to_off": statistics.median(own)}
        for name, own in ratios.items()
    ]


def _measure(config: Config, views: dict[str, View | None], repeats: int) -> dict[str, list[float]]:
    """Ratios of each method to the step without statistics in the same turn."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = Decoder(config.model, 4096, seed=0).to(device)
    adam = torch.optim.AdamW(model.parameters(), fused=True)
    tokens = torch.randint(4096, (config.train.micro_batch, config.data.sequence_length + 1), device=device)
    alone = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, expert=1))
    taken = 0

    def step(method: str) -> float:
        nonlocal taken
        start = time.perf_counter()
        with model.context.override(recording=method != "off"):
            model(tokens[:, :-1], tokens[:, 1:]).backward()
        drained = [layer.drain() for layer in model.moe_layers]
        adam.step()
        adam.zero_grad()
        taken += 1
        if method != "off":
            vectors = torch.stack([own.statistics() for own in drained]).cpu()
            report = StepReport({}, 0, dict(zip(config.model.moe_layers, vectors, strict=True)))
            row = moe_row(report, alone, taken)
            drawn = histograms(report, alone, taken)
            if (view := views[method]) is not None:
                view.log({"train/step": taken, **row}, drawn)
        elif device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    methods = ["off", *views]
    for method in methods:
        step(method)
    ratios: dict[str, list[float]] = {name: [] for name in views}
    for turn in range(repeats):
        # The order changes every turn, so that a drift of the machine favours no method.
        order = methods[turn % len(methods) :] + methods[: turn % len(methods)]
        seconds = {method: step(method) for method in order}
        for name, own in ratios.items():
            own.append(seconds[name] / seconds["off"])
    return ratios


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    return [verdict("statistics on against off", row["ratio_on_to_off"], 1.02) for row in rows[:1]]
