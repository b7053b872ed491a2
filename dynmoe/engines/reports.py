"""What every engine tells of a step, from layers that may lie on several ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from dynmoe.config import ModelConfig
from dynmoe.moe import MoELayer
from dynmoe.moe.statistics import vector_size
from dynmoe.train.engine import StepReport


def reduce_report(
    model: ModelConfig,
    layers: Sequence[MoELayer],
    recorded: bool,
    device: torch.device,
) -> StepReport:
    """Reduces the figures of the latest step over all ranks, in one collective.

    Args:
        model: of the run; its layers are reported, whichever rank holds them.
        layers: those that this rank holds.
        recorded: whether statistics were recorded; the same on every rank.
        device: of the tensors that are exchanged.
    """
    held = {layer.layer: layer for layer in layers}
    sent_bytes = sum(layer.take_sent_bytes() for layer in layers)
    scalars = [torch.full((), sent_bytes, dtype=torch.float64, device=device)]
    vectors, sizes = [], []
    for index in model.moe_layers:
        scalars.append(held[index].take_routed_rows().double() if index in held else torch.zeros_like(scalars[0]))
        size = vector_size(model, index) if recorded else 0
        nothing = torch.zeros(size, dtype=torch.float64, device=device)
        vectors.append(held[index].take_statistics() if index in held and recorded else nothing)
        sizes.append(size)
    packed = torch.cat([torch.stack(scalars), *vectors])
    dist.all_reduce(packed)
    packed = packed.cpu()  # the one wait for the device
    counts, parts = packed[: len(scalars)].tolist(), packed[len(scalars) :].split(sizes)
    return StepReport(
        routed_rows={index: int(count) for index, count in zip(model.moe_layers, counts[1:], strict=True)},
        sent_bytes=int(counts[0]),
        statistics=dict(zip(model.moe_layers, parts, strict=True)) if recorded else {},
    )
