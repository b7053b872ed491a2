"""The router: parameters, and the call of the pure function that the configuration names."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dynmoe.config import ModelConfig
from dynmoe.moe.context import MoEContext
from dynmoe.moe.initialization import named_normal
from dynmoe.ops import linear_fp32
from dynmoe.routing import RoutingCounts, RoutingPlan, losses, top_any, top_k, top_p


class Router(nn.Module):
    """Maps hidden states to a :class:`RoutingPlan`, in fp32 arithmetic whatever the precision of the weights.

    Args:
        model: router kind and its settings.
        seed: of the initial weights.
        name: prefix of this module's parameter names in the whole model.
        context: names the ranks whose tokens the auxiliary losses count.
    """

    active_E: Tensor

    def __init__(self, model: ModelConfig, seed: int, name: str, context: MoEContext) -> None:
        super().__init__()
        self.settings, self.context = model.router, context
        num_experts = model.moe.experts
        if self.settings.kind == "top_any":
            prototypes = named_normal((model.hidden, num_experts), model.init_std, seed, f"{name}.prototypes")
            self.prototypes_DE = nn.Parameter(prototypes)
            self.thresholds_E = nn.Parameter(torch.zeros(num_experts))
        else:
            self.weight_ED = nn.Parameter(
                named_normal((num_experts, model.hidden), model.init_std, seed, f"{name}.weight")
            )
        self.register_buffer("active_E", torch.ones(num_experts, dtype=torch.bool))

    @property
    def control(self) -> Tensor:
        """The k, p or mean threshold in force, a scalar without gradient."""
        settings = self.settings
        if settings.kind != "top_any":
            return self.active_E.new_tensor(settings.k if settings.kind == "top_k" else settings.p, dtype=torch.float32)
        thresholds_E = torch.sigmoid(settings.scale * self.thresholds_E.detach().float())
        return thresholds_E[self.active_E].mean()

    def forward(self, x_TD: Tensor) -> RoutingPlan:
        settings = self.settings
        limits = {"min_experts": settings.min_experts, "max_experts": settings.max_experts}
        if settings.kind == "top_any":
            return top_any(
                x_TD, self.prototypes_DE, self.thresholds_E, self.active_E,
                form=settings.form, training=self.training, scale=settings.scale, **limits,  # type: ignore[arg-type]
            )  # fmt: skip
        logits_TE = linear_fp32(x_TD, self.weight_ED)
        if settings.kind == "top_k":
            return top_k(logits_TE, settings.k, renormalize=settings.renormalize)
        return top_p(
            logits_TE, settings.p,
            form=settings.form, renormalize=settings.renormalize, **limits,  # type: ignore[arg-type]
        )  # fmt: skip

    def losses(self, plan: RoutingPlan) -> dict[str, Tensor]:
        """Every auxiliary loss in force, without its coefficient; the counts in them are over all ranks."""
        coefficients = self.settings.loss_coefficients
        counts = self._global_counts(plan) if "balance" in coefficients else None
        return {name: self._loss(name, plan, counts) for name in coefficients}

    def _loss(self, name: str, plan: RoutingPlan, counts: RoutingCounts | None) -> Tensor:
        kind = self.settings.kind
        if name == "balance":
            if kind == "top_any":
                return losses.gate_balance(plan, counts)
            return losses.load_balance(plan, counts, per_route=kind == "top_k")
        if name == "diversity":
            return losses.diversity(self.prototypes_DE, self.active_E)
        if name == "simplicity":
            return losses.simplicity(self.prototypes_DE)
        return {"entropy": losses.entropy, "z": losses.z_loss, "efficiency": losses.efficiency}[name](plan)

    def _global_counts(self, plan: RoutingPlan) -> RoutingCounts:
        local, group = RoutingCounts.of(plan), self.context.token_group
        if group is None:
            return local
        packed = torch.cat([local.selected_E, local.num_tokens.view(1), local.num_routed_tokens.view(1)])
        dist.all_reduce(packed, group=group)
        return RoutingCounts(packed[:-2], packed[-2], packed[-1], dist.get_world_size(group))
