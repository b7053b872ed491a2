"""What a layer counts in an optimizer step, and what is read of its statistics once they are summed over ranks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dynmoe.config import ModelConfig
from dynmoe.routing import RoutingPlan
from dynmoe.routing.statistics import LayerCounts, pack, packed_size, summarize


def _per_pass_names(model: ModelConfig) -> list[str]:
    """Entries that are averaged over forward passes and ranks; the others are sums."""
    # The z-loss is a mean over tokens whatever its coefficient, and is computed from the counts.
    losses = [f"{name}_loss" for name in model.router.losses if name != "z"]
    return [*losses, "auxiliary_loss", model.router.CONTROL_METRIC]


def vector_size(model: ModelConfig, layer: int) -> int:
    """Entries of the vector of MoE layer ``layer``."""
    num_experts = model.experts_of(layer)
    return 1 + len(_per_pass_names(model)) + num_experts + packed_size(num_experts)


@dataclass(frozen=True)
class PassStatistics:
    """What one forward pass adds to the vector of its layer.

    Attributes:
        losses: every auxiliary loss in force, without gradient, in the order of ``RouterSpec.losses``. Those that
            count over ranks get their values later (see ``Router.losses``).
        coefficients: of these losses.
        rest: fp64: the router's control value, experts in use, counts of the plan.
    """

    losses: dict[str, Tensor]
    coefficients: dict[str, float | Tensor]
    rest: Tensor

    @torch.no_grad()
    def vector(self) -> Tensor:
        """fp64: 1, the values of this pass, the counts of its plan; every loss must have its value."""
        auxiliary = torch.zeros_like(self.rest[0]) if not self.losses else weighted_sum(self.losses, self.coefficients)
        own = [loss for name, loss in self.losses.items() if name != "z"]
        values = torch.stack([value.double() for value in (torch.ones_like(self.rest[0]), *own, auxiliary)])
        return torch.cat([values, self.rest])


def weighted_sum(losses: dict[str, Tensor], coefficients: dict[str, float | Tensor]) -> Tensor:
    """The sum of auxiliary losses, each times its coefficient."""
    return torch.stack([coefficients[name] * loss for name, loss in losses.items()]).sum()


@torch.no_grad()
def record(
    plan: RoutingPlan,
    losses: dict[str, Tensor],
    coefficients: dict[str, float | Tensor],
    control_value: Tensor,
    active_E: Tensor,
) -> PassStatistics:
    """Statistics of one forward pass.

    Args:
        plan: of this rank's tokens.
        losses: every auxiliary loss in force, in the order of ``RouterSpec.losses``.
        coefficients: of these losses at present.
        control_value: the k, p, L1 coefficient or mean threshold in force, a scalar.
        active_E: mask of the experts in use.
    """
    rest = torch.cat([control_value.double().view(1), active_E.double(), pack(plan)])
    kept = {name: c.clone() if isinstance(c, Tensor) else c for name, c in coefficients.items()}
    return PassStatistics({name: loss.detach() for name, loss in losses.items()}, kept, rest)


@dataclass
class LayerStepStats:
    """What one layer counted on this rank in the training passes since it was last drained.

    Attributes:
        routed_rows: rows that the experts of this rank computed, int64 scalar.
        overflowed: whether tokens selected more experts than ``model.moe.max_mean_experts_per_token``, a bool scalar.
        finite: whether all scores were finite, a bool scalar.
        sent_bytes: bytes that left this rank for the experts of others and back.
        control: sums of :func:`pack_control_statistics`; None where none were collected.
        recorded: statistics of each pass in a step that was recorded.
    """

    routed_rows: Tensor
    overflowed: Tensor
    finite: Tensor
    sent_bytes: int = 0
    control: Tensor | None = None
    recorded: list[PassStatistics] = field(default_factory=list)

    @classmethod
    def empty(cls, device: torch.device) -> LayerStepStats:
        no = torch.zeros((), dtype=torch.bool, device=device)
        return cls(torch.zeros((), dtype=torch.int64, device=device), no, ~no)

    def statistics(self) -> Tensor:
        """The vector of :class:`PassStatistics`, summed over passes; every loss must have its value.

        Raises:
            RuntimeError: nothing was recorded.
        """
        if not self.recorded:
            raise RuntimeError("no statistics: run a training pass with StepState(recording=True)")
        return torch.stack([seen.vector() for seen in self.recorded]).sum(dim=0)


class LayerStatistics:
    """What the vector of MoE layer ``layer``, summed over passes and ranks, says of it.

    Args:
        vector: of :func:`record`.
        model: of the run.
        layer: index in the decoder.
    """

    def __init__(self, vector: Tensor, model: ModelConfig, layer: int) -> None:
        names = _per_pass_names(model)
        num_experts = model.experts_of(layer)
        passes, means, active_E, counts = vector.split(
            [1, len(names), num_experts, len(vector) - 1 - len(names) - num_experts]
        )
        self._means = dict(zip(names, (means / passes).tolist(), strict=True))
        self._active_E = (active_E / passes).round().long()  # the same in every pass of a step
        self._counts = LayerCounts(counts, num_experts)
        # A token cannot use what is out of use.
        self._most_experts = min(model.router.max_experts_per_token(num_experts), int(self._active_E.sum()))
        self._has_z_loss = model.router.has_field("z_loss")

    def figures(self, expert_parallel: int) -> dict[str, float]:
        """Figures under the names of the metrics file; ``expert_parallel`` ranks share the experts."""
        counts = self._counts
        z = {"z_loss": counts.scalar("z") / counts.scalar("tokens")} if self._has_z_loss else {}
        return self._means | z | summarize(counts, int(self._active_E.sum()), self._most_experts, expert_parallel)

    def histograms(self) -> dict[str, Any]:
        """Tokens by their number of experts (0 to E), tokens by expert, and which experts are in use: lists of int."""
        counts = self._counts
        return {
            "experts_per_token": counts.histogram_K.long().tolist(),
            "load": counts.load_E.long().tolist(),
            "active": self._active_E.tolist(),
        }
