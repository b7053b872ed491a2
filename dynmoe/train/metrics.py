"""The rows of metrics.jsonl, which is the truth, and what a view of them is."""

from __future__ import annotations

import resource
from typing import Protocol

import torch

from dynmoe.config import Config
from dynmoe.model.size import ModelSize
from dynmoe.moe.statistics import layer_figures
from dynmoe.train.engine import StepReport

# Dense bf16 peaks of one device in TFLOP/s, by a part of its name, from the makers' data sheets.
_PEAK_TFLOPS = {"H100 PCIe": 756.0, "H100": 989.4, "H200": 989.4, "A100": 312.0, "B200": 2250.0, "L40S": 362.0}

Row = dict[str, float]


class View(Protocol):
    """Something that shows rows elsewhere (W&B)."""

    def log(self, row: Row) -> None: ...

    def close(self) -> None: ...


def peak_tflops(given: float | None) -> float | None:
    """Peak of one device, given or by the GPU's name; None where it is unknown."""
    if given is not None or not torch.cuda.is_initialized():
        return given
    name = torch.cuda.get_device_name()
    return next((peak for part, peak in _PEAK_TFLOPS.items() if part in name), None)


def peak_memory_gib() -> float:
    """High-water mark of this process: device memory on a GPU, resident memory on a CPU."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 2**30


def moe_row(report: StepReport, config: Config) -> Row:
    """Figures of every MoE layer, and their mean over layers without the layer in the name."""
    figures = {
        layer: layer_figures(vector, config.model, layer, config.parallel.expert)
        for layer, vector in report.statistics.items()
    }
    row = {f"moe/layer_{layer:02d}/{name}": value for layer, own in figures.items() for name, value in own.items()}
    names = next(iter(figures.values()), {})
    return {f"moe/{name}": sum(own[name] for own in figures.values()) / len(figures) for name in names} | row


def throughput_row(
    size: ModelSize, tokens: int, routed_rows: int, seconds: float, world_size: int, peak: float | None, static_k: float
) -> Row:
    """Speed over an interval of ``tokens`` tokens.

    FLOPs come from the rows that were computed; beside them the figure that a report for a fixed number of
    ``static_k`` experts per token would give. ``train/mfu`` is absent where the peak is unknown.
    """
    per_rank = size.flops(tokens, routed_rows) / seconds / world_size / 1e12
    row = {
        "train/tokens_per_s": tokens / seconds,
        "train/tflops_per_rank": per_rank,
        "train/tflops_per_rank_static": size.static_flops(tokens, static_k) / seconds / world_size / 1e12,
    }
    return row if peak is None else row | {"train/mfu": per_rank / peak}
