"""Benchmark 10: a training step with MoE statistics on against the same step with them off."""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

from dynmoe.config import load_config
from dynmoe.model import Decoder
from dynmoe.ops.host_memory import keep_freed_memory


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", nargs="?", default="configs/quickstart.yaml", help="model to measure with")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")


def run(given: argparse.Namespace) -> list[dict[str, Any]]:
    torch.set_num_threads(given.threads)
    keep_freed_memory()
    config = load_config(given.config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = Decoder(config.model, 4096, seed=0).to(device)
    adam = torch.optim.AdamW(model.parameters(), fused=True)
    shape = (config.train.micro_batch, config.data.sequence_length + 1)
    tokens = torch.randint(4096, shape, device=device)

    def step(record: bool) -> float:
        start = time.perf_counter()
        model.context.recording = record
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        adam.step()
        adam.zero_grad()
        if record:
            torch.stack([layer.take_statistics() for layer in model.moe_layers]).sum().item()
        elif device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for record in (True, False):
        step(record)
    # The order within a pair changes from pair to pair: a drift of the machine favours neither.
    ratios = []
    for turn in range(given.repeats):
        first = bool(turn % 2)
        seconds = {first: step(first), (not first): step(not first)}
        ratios.append(seconds[True] / seconds[False])
    return [
        {"benchmark": "statistics", "method": "dynmoe", "dtype": "fp32", "ratio_on_to_off": statistics.median(ratios)}
    ]
