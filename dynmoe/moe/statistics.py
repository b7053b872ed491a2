"""One vector per layer and step: what is recorded in a forward pass, and what is read from it after the reduction."""

from __future__ import annotations

import torch
from torch import Tensor

from dynmoe.config import ModelConfig
from dynmoe.moe.routers import ROUTERS
from dynmoe.routing import RoutingPlan
from dynmoe.routing.statistics import LayerCounts, pack, packed_size, summarize


def _per_pass_names(model: ModelConfig) -> list[str]:
    """Entries whose mean over forward passes and ranks is meant; the others are sums."""
    control = ROUTERS[model.router.kind].figure
    return [*(f"{name}_loss" for name in model.router.loss_names), "auxiliary_loss", control, "active_experts"]


def vector_size(model: ModelConfig, layer: int) -> int:
    """Entries of the vector of MoE layer ``layer``."""
    return 1 + len(_per_pass_names(model)) + packed_size(model.experts_of(layer))


@torch.no_grad()
def record(
    plan: RoutingPlan, losses: dict[str, Tensor], total: Tensor | None, control: Tensor, active_E: Tensor
) -> Tensor:
    """What one forward pass adds to the vector of its layer, fp64: 1, the values of this pass, the counts of its plan.

    Args:
        plan: of this rank's tokens.
        losses: every auxiliary loss in force, in the order of ``RouterConfig.loss_names``.
        total: their sum with coefficients; None where there are none.
        control: the k, p, L1 coefficient or mean threshold in force, a scalar.
        active_E: mask of the experts in use.
    """
    auxiliary = torch.zeros_like(control) if total is None else total.detach()
    values = [torch.ones_like(control), *(loss.detach() for loss in losses.values()), auxiliary, control]
    values.append(active_E.sum())
    return torch.cat([torch.stack([value.double() for value in values]), pack(plan)])


def layer_figures(vector: Tensor, model: ModelConfig, layer: int, expert_parallel: int) -> dict[str, float]:
    """Figures of MoE layer ``layer``, under the names of the metrics file, from its vector over passes and ranks."""
    names = _per_pass_names(model)
    means = dict(zip(names, (vector[1 : 1 + len(names)] / vector[0]).tolist(), strict=True))
    num_experts, router = model.experts_of(layer), model.router
    counts = LayerCounts(vector[1 + len(names) :], num_experts)
    ceiling = min(
        router.k if router.kind in ("top_k", "null_experts") else router.max_experts or num_experts, num_experts
    )
    return means | summarize(counts, round(means["active_experts"]), ceiling, expert_parallel)
