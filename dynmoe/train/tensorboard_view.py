"""A view of the metrics in TensorBoard."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter

from dynmoe.train.metrics import Histograms, Row


class TensorBoardView:
    """Writes event files: metrics as scalars, experts per token as histograms, loads of experts as an image.

    Args:
        directory: directory of the event files.
        first_step: the step from which the run resumes, as later events of an earlier start are hidden; None: none are.
    """

    name = "TensorBoard"

    def __init__(self, directory: Path, first_step: int | None) -> None:
        self._writer = SummaryWriter(str(directory), purge_step=None if first_step is None else first_step + 1)

    def log(self, row: Row, histograms: Histograms | None = None) -> None:
        step = int(row["train/step"])
        for name, value in row.items():
            if name != "train/step":
                self._writer.add_scalar(name, value, step)
        if histograms is not None and histograms["layers"]:
            self._draw(histograms, step)
        self._writer.flush()

    def _draw(self, histograms: Histograms, step: int) -> None:
        layers = {int(layer): own for layer, own in histograms["layers"].items()}
        for layer, own in layers.items():
            counts = np.array(own["experts_per_token"], dtype=np.float64)
            values = np.arange(len(counts))
            self._writer.add_histogram_raw(
                f"moe/layer_{layer:02d}/experts_per_token", min=0, max=len(counts) - 1, num=counts.sum(),
                sum=counts @ values, sum_squares=counts @ values**2, bucket_limits=(values + 0.5).tolist(),
                bucket_counts=counts.tolist(), global_step=step,
            )  # fmt: skip
        # Rows of the image are layers, columns are experts; white is the largest load in a layer.
        image = torch.zeros(1, len(layers), max(len(own["load"]) for own in layers.values()))
        for place, own in enumerate(layers.values()):
            load = torch.tensor(own["load"], dtype=torch.float32)
            image[0, place, : len(load)] = load / load.max().clamp(min=1)
        self._writer.add_image("moe/load", image.repeat_interleave(16, dim=1).repeat_interleave(16, dim=2), step)

    def close(self) -> None:
        self._writer.close()
