"""The rows of metrics.jsonl and histograms.jsonl, and the interface of views that display them."""

from __future__ import annotations

import math
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

from dynmoe.config import Config
from dynmoe.model.size import ModelSize
from dynmoe.moe.budget import Budget
from dynmoe.moe.statistics import LayerStatistics
from dynmoe.train.engine import StepReport

# Dense bf16 peak of one device in TFLOP/s by a part of its name, from the vendors' data sheets; the first that fits.
_PEAK_TFLOPS = {
    "H100 PCIe": 756.0, "H100 NVL": 835.5, "H100": 989.4, "H200 NVL": 835.5, "H200": 989.4, "A100": 312.0,
    "GB200": 2500.0, "B200": 2250.0, "L40S": 362.0,
}  # fmt: skip

Row = dict[str, float]
# "train/step" of a step, and in "layers" the result of LayerStatistics.histograms by the layer's index as a string.
Histograms = dict[str, Any]
# Draws the plotly figures of a run directory, by name; implemented by the report.
Pictures = Callable[[Path], dict[str, Any]]


class View(Protocol):
    """Displays rows of metrics elsewhere, and may fail. ``name`` is shown to users."""

    name: str

    def log(self, row: Row, histograms: Histograms | None) -> None:
        """Logs a row of metrics, for some steps with histograms."""

    def close(self) -> None:
        """Ends the view. This is the last call in this start of the run."""


def peak_tflops(given: float | None) -> float | None:
    """Peak TFLOP/s of one device: the given one, or that of the GPU's name; None if unknown."""
    if given is not None or not torch.cuda.is_initialized():
        return given
    name = torch.cuda.get_device_name()
    return next((peak for part, peak in _PEAK_TFLOPS.items() if part in name), None)


def peak_memory_gib() -> float:
    """Peak memory of this process: device memory on a GPU, resident memory on a CPU."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 2**30


def perplexity(loss: float) -> float:
    """Perplexity of a loss in nats per token, limited to the range of a float."""
    return math.exp(min(loss, 700.0))


def moe_row(report: StepReport, config: Config, step: int) -> Row:
    """Metrics of every MoE layer after optimizer step ``step``, and their means over layers."""
    figures = {
        layer: LayerStatistics(vector, config.model, layer).figures(config.parallel.expert)
        for layer, vector in report.statistics.items()
    }
    row = {f"moe/layer_{layer:02d}/{name}": value for layer, own in figures.items() for name, value in own.items()}
    names = next(iter(figures.values()), {})
    means = {f"moe/{name}": sum(own[name] for own in figures.values()) / len(figures) for name in names}
    target = None if config.train.replay is not None else Budget(config).of_step(step)
    return means | ({} if target is None or not figures else {"moe/experts_per_token_target": target}) | row


def histograms(report: StepReport, config: Config, step: int) -> Histograms:
    """The entry of optimizer step ``step`` in histograms.jsonl."""
    layers = {
        str(layer): LayerStatistics(vector, config.model, layer).histograms()
        for layer, vector in report.statistics.items()
    }
    return {"train/step": step, "layers": layers}


def throughput_row(
    size: ModelSize, tokens: int, routed_rows: int, seconds: float, world_size: int, peak: float | None, static_k: float
) -> Row:
    """Throughput over an interval of ``tokens`` tokens.

    FLOPs are those of the computed rows; ``train/tflops_per_rank_static`` instead assumes ``static_k`` experts per
    token. ``train/mfu`` is absent if the peak is unknown.
    """
    per_rank = size.flops(tokens, routed_rows) / seconds / world_size / 1e12
    row = {
        "train/tokens_per_s": tokens / seconds,
        "train/tflops_per_rank": per_rank,
        "train/tflops_per_rank_static": size.static_flops(tokens, static_k) / seconds / world_size / 1e12,
    }
    return row if peak is None else row | {"train/mfu": per_rank / peak}
