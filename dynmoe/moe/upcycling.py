"""Initializes experts from copies, or slices, of a trained feed-forward layer."""

from __future__ import annotations

import torch

from dynmoe.moe.experts import GroupedExperts, SwiGLU
from dynmoe.moe.layer import MoELayer


@torch.no_grad()
def copy_experts(dense: SwiGLU, experts: GroupedExperts, granularity: int, seed: int, symmetry_break: float) -> None:
    """Fills experts with copies, or slices, of a dense layer that compute the same but learn differently.

    Every expert multiplies its up projection by a random factor for each neuron and divides its down projection by it
    (log-normal, with deviation ``symmetry_break``). SwiGLU is linear in the up projection, so the output is unchanged,
    but gradients and the steps of Adam differ. The ``granularity`` slices of a copy are multiplied by their number, so
    that gates that sum to 1 give the whole output.
    """
    gate_FD, up_FD = dense.w_up_HD.chunk(2)
    width = gate_FD.shape[0] // granularity
    generator = torch.Generator().manual_seed(seed)
    for expert in range(experts.w_up_EHD.shape[0]):
        rows = slice(expert % granularity * width, (expert % granularity + 1) * width)
        factor_F = torch.exp(symmetry_break * torch.randn(width, generator=generator))
        experts.w_up_EHD[expert] = torch.cat([gate_FD[rows], up_FD[rows] * factor_F[:, None]])
        experts.w_down_EDF[expert] = dense.w_down_DF[:, rows] * (granularity / factor_F)


@torch.no_grad()
def share_rows(layer: MoELayer, granularity: int) -> None:
    """Gives the slices of a copy the same scores, so they are selected together."""
    first_E = torch.arange(layer.num_experts) // granularity * granularity
    for name, parameter in layer.router.named_parameters():
        if name == "prototypes_DE":
            parameter.copy_(parameter[:, first_E])
        elif name == "weight_ED":  # the rows of null experts follow
            parameter[: layer.num_experts] = parameter[first_E]
