"""The router: parameters, the state that is moved between steps, and the call of the function of its kind."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from dynmoe.config import ModelConfig
from dynmoe.moe.calibration import thresholds_for_share
from dynmoe.moe.context import MoEContext
from dynmoe.moe.initialization import named_normal
from dynmoe.ops import linear_fp32
from dynmoe.routing import (
    RoutingCounts,
    RoutingPlan,
    expert_threshold,
    losses,
    null_experts,
    relu,
    sigmoid_cutoff,
    top_any,
    top_k,
    top_p,
)
from dynmoe.routing.null_experts import null_balance

# Thresholds stay within this many deviations of the mean score: no further off than any token may be.
_REACH = 6.0


def active_at_start(num_experts: int, wanted: int | None, spread: bool) -> Tensor:
    """Mask of the slots in use at the start: the first ones, or spread evenly so that every rank has its share."""
    active_E = torch.zeros(num_experts, dtype=torch.bool)
    count = num_experts if wanted is None else wanted
    active_E[[place * num_experts // count if spread else place for place in range(count)]] = True
    return active_E


class Router(nn.Module):
    """Maps hidden states to a :class:`RoutingPlan`, in fp32 arithmetic whatever the precision of the weights.

    Buffers hold what is moved outside autograd, in fp32 whatever the precision of the model:
    ``active_E`` the slots in use; ``offset_E`` what is added to each threshold (top_k: taken from each score;
    expert_threshold: the cut-offs themselves); ``p`` (top_p) and ``l1`` (relu) the scalars in force; ``error`` the
    budget controller's last error; ``experts_per_token`` and ``deviation`` (of what is compared with thresholds) moving
    averages, 0 before the first step; ``calibrated`` whether thresholds were set from first scores; ``window_*`` what
    adaptation recorded so far (top_any).

    Args:
        model: router kind and its settings.
        num_experts: expert slots of this layer.
        seed: of the initial weights.
        name: prefix of this module's parameter names in the whole model.
        context: names the ranks whose tokens the auxiliary losses count.
    """

    active_E: Tensor
    offset_E: Tensor
    p: Tensor
    l1: Tensor
    error: Tensor
    deviation: Tensor
    experts_per_token: Tensor
    calibrated: Tensor
    window_selected_E: Tensor
    window_unclaimed: Tensor
    window_unclaimed_D: Tensor
    window_tokens: Tensor

    def __init__(self, model: ModelConfig, num_experts: int, seed: int, name: str, context: MoEContext) -> None:
        super().__init__()
        settings = model.router
        self.settings, self.options, self.context = settings, settings.options, context
        self._running: Tensor | None = None
        self._finite: Tensor | None = None
        if settings.kind == "top_any":
            prototypes = named_normal((model.hidden, num_experts), model.init_std, seed, f"{name}.prototypes")
            self.prototypes_DE = nn.Parameter(prototypes)
            self.thresholds_E = nn.Parameter(torch.zeros(num_experts))
            self.base_scale = settings.scale * (math.sqrt(model.hidden) if self.options.temperature != "fixed" else 1.0)
            if self.options.temperature == "learned":
                self.log_scale = nn.Parameter(torch.tensor([math.log(self.base_scale)]))
        else:
            rows = num_experts + (settings.num_null if settings.kind == "null_experts" else 0)
            self.weight_ED = nn.Parameter(named_normal((rows, model.hidden), model.init_std, seed, f"{name}.weight"))
        spread = settings.form != "released"
        self.register_buffer("active_E", active_at_start(num_experts, model.moe.active_at_start, spread))
        cutoff = settings.cutoff if settings.kind == "expert_threshold" else 0.0
        self.register_buffer("offset_E", torch.full((num_experts,), cutoff))
        self.register_buffer("error", torch.tensor(0.0))
        self.register_buffer("experts_per_token", torch.tensor(0.0))
        self.register_buffer("deviation", torch.tensor(0.0))
        self.register_buffer("calibrated", torch.tensor(self.options.initial_experts is None))
        if settings.kind == "top_p":
            self.register_buffer("p", torch.tensor(settings.p))
        if settings.kind == "relu":
            self.register_buffer("l1", torch.tensor(settings.l1_start))
        if settings.kind == "top_any":
            self.register_buffer("window_selected_E", torch.zeros(num_experts, dtype=torch.float64))
            self.register_buffer("window_unclaimed_D", torch.zeros(model.hidden, dtype=torch.float64))
            self.register_buffer("window_unclaimed", torch.zeros((), dtype=torch.float64))
            self.register_buffer("window_tokens", torch.zeros((), dtype=torch.float64))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        """Moves with the module, but keeps the precision of its state: engines cast whole modules to bf16."""
        state = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in state.items():
            moved = self._buffers[name]
            if buffer is not None and moved is not None:
                self._buffers[name] = buffer.to(moved.device)
        return self

    @property
    def scale(self) -> Tensor | float:
        """top_any: the factor on cosines and thresholds."""
        return self.log_scale.float().exp() if self.options.temperature == "learned" else self.base_scale

    @property
    @torch.no_grad()
    def control(self) -> Tensor:
        """What decides how many experts a token gets, a scalar without gradient: k, p, L1 or the mean threshold."""
        kind = self.settings.kind
        if kind in ("top_k", "null_experts"):
            return torch.full((), float(self.settings.k), device=self.offset_E.device)
        if kind in ("top_p", "relu"):
            return self.p if kind == "top_p" else self.l1
        return (self._score_thresholds_E() * self.active_E).sum() / self.active_E.sum()

    def _score_thresholds_E(self) -> Tensor:
        """The thresholds in force as scores, between 0 and 1."""
        if self.settings.kind == "top_any":
            return torch.sigmoid(self.scale * (self._base_E() + self.offset_E))
        if self.settings.kind == "sigmoid":
            return torch.sigmoid(self._base_E() + self.offset_E)
        return self.offset_E

    def _base_E(self) -> Tensor | float:
        """What offsets are added to: trained thresholds (top_any), or the logit of the cut-off (sigmoid)."""
        if self.settings.kind == "top_any":
            return self.thresholds_E.float()
        return math.log(self.settings.cutoff / (1.0 - self.settings.cutoff))

    @torch.no_grad()
    def compared_TE(self, plan: RoutingPlan) -> Tensor:
        """What a plan of this router compared with its thresholds: cosines (top_any) or logits (sigmoid)."""
        logits_TE = torch.logit(plan.scores_TE.detach(), eps=1e-6)
        return logits_TE / self.scale if self.settings.kind == "top_any" else logits_TE

    @torch.no_grad()
    def shift_thresholds(self, change_E: Tensor, mean_E: Tensor) -> None:
        """Moves the thresholds of active experts by ``change_E`` deviations, and keeps them where scores can be.

        Args:
            change_E: in deviations of what is compared with the thresholds.
            mean_E: of what was compared in the last step, by expert.
        """
        base, reach = self._base_E(), _REACH * self.deviation
        moved_E = (base + self.offset_E + change_E * self.deviation).clamp(mean_E - reach, mean_E + reach)
        self.offset_E.copy_(torch.where(self.active_E, moved_E - base, self.offset_E))

    def forward(self, x_TD: Tensor) -> RoutingPlan:
        plan = self._route[self.settings.kind](self, x_TD)
        if self.training and not self.context.recomputing:
            finite = torch.isfinite(plan.scores_TE.detach()).all()
            self._finite = finite if self._finite is None else self._finite & finite
        return plan

    def take_finite(self) -> Tensor:
        """Whether all scores since the last call were finite numbers; a bool scalar."""
        finite, self._finite = self._finite, None
        return torch.ones_like(self.active_E[0]) if finite is None else finite

    def _limits(self) -> dict[str, Any]:
        return {"min_experts": self.options.min_experts, "max_experts": self.settings.max_experts}

    def _top_k(self, x_TD: Tensor) -> RoutingPlan:
        logits_TE = linear_fp32(x_TD, self.weight_ED)
        return top_k(logits_TE, self.settings.k, renormalize=self.options.renormalize, bias_E=-self.offset_E)

    def _top_p(self, x_TD: Tensor) -> RoutingPlan:
        form = "released" if self.settings.form == "released" else "paper"
        return top_p(
            linear_fp32(x_TD, self.weight_ED), self.p,
            form=form, renormalize=self.options.renormalize, **self._limits(),
        )  # fmt: skip

    def _top_any(self, x_TD: Tensor) -> RoutingPlan:
        if self.context.calibrating:
            cosine_TE = F.normalize(x_TD.float(), dim=1) @ F.normalize(self.prototypes_DE.float(), dim=0)
            self._calibrate(cosine_TE - self._base_E())
        released, options = self.settings.form == "released", self.options
        return top_any(
            x_TD, self.prototypes_DE, self._base_E() + self.offset_E, self.active_E,  # type: ignore[arg-type]
            form="released" if released else "paper", training=self.training, scale=self.scale,
            straight_through=options.straight_through, weights=options.weights, renormalize=options.renormalize,
            **self._limits(),
        )  # fmt: skip

    def _sigmoid(self, x_TD: Tensor) -> RoutingPlan:
        logits_TE = linear_fp32(x_TD, self.weight_ED)
        if self.context.calibrating:
            self._calibrate(logits_TE - self._base_E())
        return sigmoid_cutoff(
            logits_TE, self._score_thresholds_E(), renormalize=self.options.renormalize, **self._limits()
        )

    def _expert_threshold(self, x_TD: Tensor) -> RoutingPlan:
        logits_TE = linear_fp32(x_TD, self.weight_ED)
        if self.context.calibrating:
            self._calibrate(torch.sigmoid(logits_TE))
        return expert_threshold(logits_TE, self.offset_E, renormalize=self.options.renormalize)

    def _relu(self, x_TD: Tensor) -> RoutingPlan:
        return relu(linear_fp32(x_TD, self.weight_ED), max_experts=self.settings.max_experts)

    def _null_experts(self, x_TD: Tensor) -> RoutingPlan:
        return null_experts(
            linear_fp32(x_TD, self.weight_ED), self.settings.k, self.settings.num_null,
            renormalize=self.options.renormalize,
        )  # fmt: skip

    _route: ClassVar[dict[str, Callable[[Router, Tensor], RoutingPlan]]] = {
        "top_k": _top_k,
        "top_p": _top_p,
        "top_any": _top_any,
        "sigmoid": _sigmoid,
        "expert_threshold": _expert_threshold,
        "relu": _relu,
        "null_experts": _null_experts,
    }

    @torch.no_grad()
    def _calibrate(self, values_TE: Tensor) -> None:
        """Sets the offsets so that each active expert passes its share of the tokens of all ranks."""
        wanted = self.options.initial_experts
        if wanted is None or bool(self.calibrated):
            return
        share = min(1.0, wanted / int(self.active_E.sum()))
        self.offset_E.copy_(thresholds_for_share(values_TE.detach(), share, self.context.token_group))
        self.calibrated.fill_(True)

    @property
    def loss_coefficients(self) -> dict[str, float | Tensor]:
        """Coefficient of every auxiliary loss in force."""
        adaptive = {"l1": self.l1} if self.settings.kind == "relu" else {}
        return {**self.settings.loss_coefficients, **adaptive}

    def losses(self, plan: RoutingPlan, num_sequences: int = 1) -> dict[str, Tensor]:
        """Every auxiliary loss in force, without its coefficient; its counts are those of the configured scope.

        Args:
            plan: of this rank's tokens, before capacity drops routes.
            num_sequences: sequences that the tokens belong to, one after the other.
        """
        names = self.settings.loss_names
        counts = self._counts(plan) if "balance" in names or "l1" in names else None
        return {name: self._loss(name, plan, counts, num_sequences) for name in names}

    def _loss(self, name: str, plan: RoutingPlan, counts: RoutingCounts | None, num_sequences: int) -> Tensor:
        if name == "balance":
            return self._balance_loss(plan, counts, num_sequences)
        if name == "diversity":
            return losses.diversity(self.prototypes_DE, self.active_E)
        counted_E = None if self.settings.form == "released" else self.active_E
        if name == "simplicity":
            return losses.simplicity(self.prototypes_DE, counted_E)
        if name == "efficiency":
            return losses.efficiency(plan, active_E=counted_E)
        if name == "l1":
            return losses.l1(plan, self.context.target_experts, counts)
        return {"entropy": losses.entropy, "z": losses.z_loss}[name](plan)

    def _balance_loss(self, plan: RoutingPlan, counts: RoutingCounts | None, num_sequences: int) -> Tensor:
        settings, per_route = self.settings, self.options.balance_per_route
        if settings.kind == "top_any":
            if settings.form == "improved":
                return losses.choice_balance(plan, self.active_E, counts)
            counted_E = None if settings.form == "released" else self.active_E
            return losses.gate_balance(plan, counts, active_E=counted_E, per_route=per_route)
        if settings.kind == "null_experts":
            return null_balance(plan, settings.k, settings.num_null, counts)
        if settings.balance_scope == "sequence":
            return losses.sequence_balance(plan, num_sequences, per_route=per_route)
        return losses.load_balance(plan, counts, per_route=per_route)

    def _counts(self, plan: RoutingPlan) -> RoutingCounts:
        """Counts of the configured scope; those of the step so far grow with each of its micro-batches."""
        local, group = RoutingCounts.of(plan), self.context.token_group
        if self.settings.balance_scope != "global_batch":
            return local
        passes = self.context.micro_batch + 1
        if not self.context.recomputing or self._running is None:  # a repeated pass finds its counts as they were
            packed = torch.cat([local.selected_E, local.num_tokens.view(1), local.num_routed_tokens.view(1)])
            if group is not None:
                dist.all_reduce(packed, group=group)
            self._running = packed if passes == 1 or self._running is None else self._running + packed
        ranks = 1 if group is None else dist.get_world_size(group)
        return RoutingCounts(self._running[:-2], self._running[-2], self._running[-1], ranks * passes)
