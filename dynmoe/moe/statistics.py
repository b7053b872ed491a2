"""One vector per layer and step: what is recorded in a forward pass, and what is read from it after the reduction."""

from __future__ import annotations

import torch
from torch import Tensor

from dynmoe.config import ModelConfig
from dynmoe.routing import RoutingPlan
from dynmoe.routing.statistics import LayerCounts, pack, packed_size, summarize


def _per_pass_names(model: ModelConfig) -> list[str]:
    """Entries whose mean over forward passes and ranks is meant; the others are sums."""
    control = {"top_k": "router_k", "top_p": "router_p", "top_any": "router_threshold_mean"}[model.router.kind]
    return [*(f"{name}_loss" for name in model.router.loss_coefficients), control, "active_experts"]


def vector_size(model: ModelConfig) -> int:
    """Entries of one layer's vector."""
    return 1 + len(_per_pass_names(model)) + packed_size(model.moe.experts)


def record(plan: RoutingPlan, losses: dict[str, Tensor], control: Tensor, active_E: Tensor) -> Tensor:
    """What one forward pass adds to the vector of its layer, fp64: 1, the values of this pass, the counts of its plan.

    Args:
        plan: of this rank's tokens.
        losses: every auxiliary loss in force, in the order of ``RouterConfig.loss_coefficients``.
        control: the k, p or mean threshold in force, a scalar.
        active_E: mask of the experts in use.
    """
    values = [torch.ones_like(control), *(loss.detach() for loss in losses.values()), control, active_E.sum()]
    return torch.cat([torch.stack([value.double() for value in values]), pack(plan)])


def layer_figures(vector: Tensor, model: ModelConfig, expert_parallel: int) -> dict[str, float]:
    """Figures of one layer, under the names of the metrics file, from its vector summed over passes and ranks."""
    names = _per_pass_names(model)
    means = dict(zip(names, (vector[1 : 1 + len(names)] / vector[0]).tolist(), strict=True))
    counts = LayerCounts(vector[1 + len(names) :], model.moe.experts)
    ceiling = model.router.k if model.router.kind == "top_k" else model.router.max_experts or model.moe.experts
    return means | summarize(counts, round(means["active_experts"]), ceiling, expert_parallel)
