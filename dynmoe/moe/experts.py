"""The experts that one rank holds."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynmoe.config import ModelConfig
from dynmoe.moe.dispatcher import DispatchedTokens
from dynmoe.moe.initialization import named_normal
from dynmoe.ops import routed_experts


def down_std(model: ModelConfig) -> float:
    """Initial standard deviation of projections into the residual stream (GPT-2: scaled by 1 / sqrt(2 layers))."""
    return model.init_std / math.sqrt(2 * model.layers)


class GroupedExperts(nn.Module):
    """SwiGLU experts as two stacked parameters.

    Args:
        model: widths and initial scale.
        experts: global indices of the experts on this rank, consecutive.
        seed: of the initial weights.
        name: prefix of this module's parameter names in the whole model.
    """

    def __init__(self, model: ModelConfig, experts: range, seed: int, name: str) -> None:
        super().__init__()
        hidden = model.hidden
        width = model.moe.expert_hidden
        self.experts = experts
        self._draw = (
            lambda e: named_normal((2 * width, hidden), model.init_std, seed, f"{name}.w_up.{e}"),
            lambda e: named_normal((hidden, width), down_std(model), seed, f"{name}.w_down.{e}"),
        )
        up, down = ([draw(str(e)) for e in experts] for draw in self._draw)
        self.w_up_EHD = nn.Parameter(torch.stack(up))
        self.w_down_EDF = nn.Parameter(torch.stack(down))
        for parameter in self.parameters():
            # Tells both engines not to average the gradient over all data-parallel ranks.
            parameter.allreduce = False  # type: ignore[attr-defined]

    def fresh_weights(self, expert: int, label: str) -> list[tuple[nn.Parameter, Tensor]]:
        """New initial weights of an expert (global index), each with its parameter; they depend on ``label``."""
        name = f"{expert}.{label}"
        parameters = (self.w_up_EHD, self.w_down_EDF)
        return [(own, draw(name).to(own.device)) for own, draw in zip(parameters, self._draw, strict=True)]

    def forward(self, x_TD: Tensor, dispatched: DispatchedTokens) -> Tensor:
        """Returns the sum of the gated outputs of this rank's experts for each token."""
        return routed_experts(
            x_TD, dispatched.gates_TE, self.w_up_EHD, self.w_down_EDF, dispatched.permutation, dispatched.backend
        )  # fmt: skip


class SwiGLU(nn.Module):
    """A dense SwiGLU layer: the feed-forward layer of dense layers, and a shared expert without a gate."""

    def __init__(self, model: ModelConfig, width: int, seed: int, name: str) -> None:
        super().__init__()
        self.w_up_HD = nn.Parameter(named_normal((2 * width, model.hidden), model.init_std, seed, f"{name}.w_up"))
        self.w_down_DF = nn.Parameter(named_normal((model.hidden, width), down_std(model), seed, f"{name}.w_down"))

    def forward(self, x: Tensor) -> Tensor:
        gate, up = F.linear(x, self.w_up_HD).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, self.w_down_DF)


class GatedSwiGLU(SwiGLU):
    """A shared expert, times the sigmoid of one trained logit for each token (Qwen2-MoE)."""

    def __init__(self, model: ModelConfig, width: int, seed: int, name: str) -> None:
        super().__init__(model, width, seed, name)
        self.w_gate_1D = nn.Parameter(named_normal((1, model.hidden), model.init_std, seed, f"{name}.w_gate"))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w_gate_1D).sigmoid() * super().forward(x)
