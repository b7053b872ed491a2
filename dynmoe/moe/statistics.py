"""Statistics of a layer in an optimizer step, and the metrics computed from them after the sum over ranks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dynmoe.config import ModelConfig
from dynmoe.moe.router import Router
from dynmoe.routing import RoutingPlan
from dynmoe.routing.statistics import LayerCounts, pack, packed_size, summarize


def _per_pass_names(model: ModelConfig) -> list[str]:
    """Names of the entries that are averaged over forward passes and ranks; the others are sums."""
    # The z-loss is computed from the counts, so it is known even if its coefficient is 0.
    losses = [f"{name}_loss" for name in model.router.losses if name != "z"]
    return [*losses, "auxiliary_loss", model.router.CONTROL_METRIC]


def vector_size(model: ModelConfig, layer: int) -> int:
    """Size of the vector of MoE layer ``layer``."""
    num_experts = model.experts_of(layer)
    return 1 + len(_per_pass_names(model)) + num_experts + packed_size(num_experts)


@dataclass(frozen=True)
class PassStatistics:
    """Statistics of one forward pass of a layer.

    Attributes:
        losses: the active auxiliary losses, detached, in the order of ``RouterSpec.losses``. Losses with counts over
            ranks are NaN until the counts arrive (see ``Router.losses``).
        coefficients: of these losses.
        rest: fp64: the router's control value, the mask of active experts, and the counts of the plan.
    """

    losses: dict[str, Tensor]
    coefficients: dict[str, float | Tensor]
    rest: Tensor

    @torch.no_grad()
    def vector(self) -> Tensor:
        """fp64: 1, the losses and :attr:`rest`; the value of every loss must be known."""
        auxiliary = torch.zeros_like(self.rest[0]) if not self.losses else weighted_sum(self.losses, self.coefficients)
        own = [loss for name, loss in self.losses.items() if name != "z"]
        values = torch.stack([value.double() for value in (torch.ones_like(self.rest[0]), *own, auxiliary)])
        return torch.cat([values, self.rest])


def weighted_sum(losses: dict[str, Tensor], coefficients: dict[str, float | Tensor]) -> Tensor:
    """The sum of the auxiliary losses times their coefficients."""
    return torch.stack([coefficients[name] * loss for name, loss in losses.items()]).sum()


@torch.no_grad()
def record(plan: RoutingPlan, losses: dict[str, Tensor], router: Router) -> PassStatistics:
    """Statistics of one forward pass; ``losses`` are the router's, in the order of ``RouterSpec.losses``."""
    rest = torch.cat([router.control_value.double().view(1), router.active_E.double(), pack(plan)])
    coefficients = {name: c.clone() if isinstance(c, Tensor) else c for name, c in router.loss_coefficients.items()}
    return PassStatistics({name: loss.detach() for name, loss in losses.items()}, coefficients, rest)


@dataclass
class LayerStepStats:
    """Statistics of one layer on this rank, over the training passes since the last ``MoELayer.drain``.

    Attributes:
        routed_rows: number of rows that the experts of this rank computed, int64 scalar.
        overflowed: True if tokens selected more experts than ``model.moe.max_mean_experts_per_token``, a bool scalar.
        finite: True if all scores were finite, a bool scalar.
        sent_bytes: bytes that were sent to other ranks.
        update_sums: sum of :func:`pack_update_statistics`; None if not collected.
        recorded: statistics of each forward pass, if recording.
    """

    routed_rows: Tensor
    overflowed: Tensor
    finite: Tensor
    sent_bytes: int = 0
    update_sums: Tensor | None = None
    recorded: list[PassStatistics] = field(default_factory=list)

    @classmethod
    def empty(cls, device: torch.device) -> LayerStepStats:
        no = torch.zeros((), dtype=torch.bool, device=device)
        return cls(torch.zeros((), dtype=torch.int64, device=device), no, ~no)

    def statistics(self) -> Tensor:
        """Sum of the vectors of :class:`PassStatistics`; the value of every loss must be known.

        Raises:
            RuntimeError: nothing was recorded.
        """
        if not self.recorded:
            raise RuntimeError("no statistics were recorded; run a training pass with StepState(recording=True)")
        return torch.stack([statistics.vector() for statistics in self.recorded]).sum(dim=0)


class LayerStatistics:
    """Metrics of MoE layer ``layer``.

    Args:
        vector: of :class:`PassStatistics`, summed over forward passes and ranks.
        model: configuration of the model.
        layer: index in the decoder.
    """

    def __init__(self, vector: Tensor, model: ModelConfig, layer: int) -> None:
        names = _per_pass_names(model)
        num_experts = model.experts_of(layer)
        passes, means, active_E, counts = vector.split(
            [1, len(names), num_experts, len(vector) - 1 - len(names) - num_experts]
        )
        self._means = dict(zip(names, (means / passes).tolist(), strict=True))
        self._active_E = (active_E / passes).round().long()  # the same in every forward pass of a step
        self._counts = LayerCounts(counts, num_experts)
        self._most_experts = min(model.router.max_experts_per_token(num_experts), int(self._active_E.sum()))
        self._has_z_loss = model.router.has_field("z_loss")

    def figures(self, expert_parallel: int) -> dict[str, float]:
        """Metrics by their names in the metrics file; the experts are spread over ``expert_parallel`` ranks."""
        counts = self._counts
        z = {"z_loss": counts.scalar("z") / counts.scalar("tokens")} if self._has_z_loss else {}
        return self._means | z | summarize(counts, int(self._active_E.sum()), self._most_experts, expert_parallel)

    def histograms(self) -> dict[str, Any]:
        """Lists of int: tokens by number of experts (0 to E), tokens by expert, and 1 for each active expert."""
        counts = self._counts
        return {
            "experts_per_token": counts.histogram_K.long().tolist(),
            "load": counts.load_E.long().tolist(),
            "active": self._active_E.tolist(),
        }
