"""One vector per layer and step: what is recorded in a forward pass, and what is read from it after the reduction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dynmoe.config import ModelConfig
from dynmoe.config.routing import KINDS
from dynmoe.moe.routers import ROUTERS
from dynmoe.routing import RoutingPlan
from dynmoe.routing.statistics import LayerCounts, pack, packed_size, summarize


def _per_pass_names(model: ModelConfig) -> list[str]:
    """Entries whose mean over forward passes and ranks is meant; the others are sums."""
    control = ROUTERS[model.router.kind].figure
    # The z-loss is a mean over tokens whatever its coefficient, and is taken from the counts.
    return [*(f"{name}_loss" for name in model.router.loss_names if name != "z"), "auxiliary_loss", control]


def vector_size(model: ModelConfig, layer: int) -> int:
    """Entries of the vector of MoE layer ``layer``."""
    num_experts = model.experts_of(layer)
    return 1 + len(_per_pass_names(model)) + num_experts + packed_size(num_experts)


@dataclass(frozen=True)
class PassStatistics:
    """What one forward pass adds to the vector of its layer.

    Attributes:
        losses: every auxiliary loss in force, without gradient, in the order of ``RouterConfig.loss_names``. Those that
            count over ranks get their values later (see ``Router.losses``).
        coefficients: of these losses.
        rest: fp64: the router's control, experts in use, counts of the plan.
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
    control: Tensor,
    active_E: Tensor,
) -> PassStatistics:
    """Statistics of one forward pass.

    Args:
        plan: of this rank's tokens.
        losses: every auxiliary loss in force, in the order of ``RouterConfig.loss_names``.
        coefficients: of these losses at present.
        control: the k, p, L1 coefficient or mean threshold in force, a scalar.
        active_E: mask of the experts in use.
    """
    rest = torch.cat([control.double().view(1), active_E.double(), pack(plan)])
    kept = {name: c.clone() if isinstance(c, Tensor) else c for name, c in coefficients.items()}
    return PassStatistics({name: loss.detach() for name, loss in losses.items()}, kept, rest)


class LayerStatistics:
    """What the vector of MoE layer ``layer``, summed over passes and ranks, says of it.

    Args:
        vector: of :func:`record`.
        model: of the run.
        layer: index in the decoder.
    """

    def __init__(self, vector: Tensor, model: ModelConfig, layer: int) -> None:
        names, num_experts, router = _per_pass_names(model), model.experts_of(layer), model.router
        passes, means, active_E, counts = vector.split(
            [1, len(names), num_experts, len(vector) - 1 - len(names) - num_experts]
        )
        self._means = dict(zip(names, (means / passes).tolist(), strict=True))
        self._active_E = (active_E / passes).round().long()  # the same in every pass of a step
        self._counts = LayerCounts(counts, num_experts)
        fixed = router.k if router.kind in ("top_k", "null_experts") else router.max_experts
        # A token cannot use what is out of use.
        self._ceiling = min(fixed or num_experts, int(self._active_E.sum()))
        self._has_logits = "z_loss" in KINDS[router.kind].fields

    def figures(self, expert_parallel: int) -> dict[str, float]:
        """Figures under the names of the metrics file; ``expert_parallel`` ranks share the experts."""
        counts = self._counts
        z = {"z_loss": counts.scalar("z") / counts.scalar("tokens")} if self._has_logits else {}
        return self._means | z | summarize(counts, int(self._active_E.sum()), self._ceiling, expert_parallel)

    def histograms(self) -> dict[str, Any]:
        """Tokens by their number of experts (0 to E), tokens by expert, and which experts are in use: lists of int."""
        counts = self._counts
        return {
            "experts_per_token": counts.histogram_K.long().tolist(),
            "load": counts.load_E.long().tolist(),
            "active": self._active_E.tolist(),
        }
