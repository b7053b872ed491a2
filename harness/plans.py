"""Random routing plans with a given number of routes and imbalance."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dynmoe.routing import RoutingPlan

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Shape:
    """Sizes of one layer: T, D, F and E."""

    tokens: int = 4096
    hidden: int = 512
    width: int = 1024
    experts: int = 16


def spread_plan(
    shape: Shape, mean_k: float, imbalance: float = 1.0, seed: int = 0, device: torch.device = DEVICE
) -> RoutingPlan:
    """A plan of exactly ``mean_k * T`` routes in which the busiest expert has ``imbalance`` times the mean load.

    The other experts share the rest evenly; each draws its tokens at random, so that K differs from token to token.
    """
    generator = torch.Generator().manual_seed(seed)
    num_routes = round(mean_k * shape.tokens)
    most = round(imbalance * num_routes / shape.experts)
    if most > shape.tokens:
        raise ValueError(f"imbalance={imbalance} gives one expert {most} of {shape.tokens} tokens")
    others = shape.experts - 1
    loads = [most, *((num_routes - most) // others + (e < (num_routes - most) % others) for e in range(others))]
    map_TE = torch.zeros(shape.tokens, shape.experts, dtype=torch.bool)
    for expert, load in enumerate(loads):
        map_TE[torch.randperm(shape.tokens, generator=generator)[:load], expert] = True
    scores_TE = torch.rand(shape.tokens, shape.experts, generator=generator)
    gates_TE = scores_TE * map_TE / mean_k
    gates_TE, map_TE, scores_TE = (tensor.to(device) for tensor in (gates_TE, map_TE, scores_TE))
    return RoutingPlan(gates_TE, map_TE, map_TE, scores_TE)
