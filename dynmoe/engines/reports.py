"""What every engine tells of a step, from layers that may lie on several ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from dynmoe.config import ModelConfig
from dynmoe.config.routing import KINDS
from dynmoe.moe import MoELayer
from dynmoe.moe.statistics import vector_size
from dynmoe.train.engine import StepReport


def reduce_report(
    model: ModelConfig,
    layers: Sequence[MoELayer],
    lm_loss: float,
    grad_norm: float,
    recorded: bool,
    device: torch.device,
) -> StepReport:
    """Reduces the figures of the latest step over all ranks, in one collective.

    Args:
        model: of the run; its layers are reported, whichever rank holds them.
        layers: those that this rank holds.
        lm_loss: this rank's share of the loss; the sum over ranks is reported.
        grad_norm: of the whole model.
        recorded: whether statistics were recorded; the same on every rank.
        device: of the tensors that are exchanged.
    """
    held = {layer.layer: layer for layer in layers}
    sent_bytes = sum(layer.take_sent_bytes() for layer in layers)
    scalars, vectors, sizes = [lm_loss, float(sent_bytes)], [], []
    for index in model.moe_layers:
        scalars.append(float(held[index].take_routed_rows()) if index in held else 0.0)
        size = vector_size(model, index) if recorded else 0
        nothing = torch.zeros(size, dtype=torch.float64, device=device)
        vectors.append(held[index].take_statistics() if index in held and recorded else nothing)
        sizes.append(size)
    packed = torch.cat([torch.tensor(scalars, dtype=torch.float64, device=device), *vectors])
    dist.all_reduce(packed)
    packed = packed.cpu()
    rows, parts = packed[2 : len(scalars)], packed[len(scalars) :].split(sizes)
    return StepReport(
        lm_loss=packed[0].item(),
        grad_norm=grad_norm,
        routed_rows={index: int(count) for index, count in zip(model.moe_layers, rows.tolist(), strict=True)},
        sent_bytes=int(packed[1]),
        statistics=dict(zip(model.moe_layers, parts, strict=True)) if recorded else {},
    )


def describe_nonfinite(
    model: ModelConfig, layers: Sequence[MoELayer], step: int, grad_norm: float, device: torch.device
) -> str:
    """Where a gradient that is not finite came from, as far as the layers saw it; collective."""
    cure = "go on from a checkpoint with a lower optimizer.lr"
    fine = torch.zeros(2, dtype=torch.bool, device=device)
    held = {
        layer.layer: torch.stack([layer.take_over_ceiling(), ~layer.router.take_finite()]).to(device)
        for layer in layers
    }
    trouble = torch.stack([fine, *(held.get(index, fine) for index in model.moe_layers)])
    everywhere = [torch.zeros_like(trouble) for _ in range(dist.get_world_size())]
    dist.all_gather(everywhere, trouble)
    for place, index in enumerate(model.moe_layers, start=1):
        for kind in range(2):  # a ceiling comes first: what lies behind it is made NaN
            ranks = [rank for rank, seen in enumerate(everywhere) if bool(seen[place, kind])]
            where = f"layer {index} on rank {', '.join(map(str, ranks))}"
            if ranks and kind == 0:
                lower = "lower model.router.max_experts, " if "max_experts" in KINDS[model.router.kind].fields else ""
                return (
                    f"step {step}: tokens want more experts than model.moe.ceiling={model.moe.ceiling} in {where}; "
                    f"raise it, {lower}or drop routes with model.moe.at_ceiling=drop"
                )
            if ranks:
                return f"step {step}: router scores are not finite in {where}; {cure}"
    return f"step {step}: the gradient norm is {grad_norm}; {cure}"
