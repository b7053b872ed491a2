"""The MoE layer of an exported model: routers, experts, shared expert. This file travels with the weights.

The routers' formulas are the project's own, and travel in ``routing_dynmoe.py``. Shape letters as in
``modeling_dynmoe.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynmoe.hf.configuration_dynmoe import DynMoEConfig
from dynmoe.hf.serving_dynmoe import ExpertsHost
from dynmoe.routing import RoutingPlan, expert_threshold, null_experts, relu, sigmoid_cutoff, top_any, top_k, top_p
from dynmoe.routing.losses import (
    choice_balance,
    diversity,
    efficiency,
    entropy,
    gate_balance,
    load_balance,
    simplicity,
    z_loss,
)
from dynmoe.routing.null_experts import null_balance

# What training changes by other means than gradients: the name of a buffer by kind of router.
STATE = {"top_k": "bias", "top_p": "p"} | dict.fromkeys(("sigmoid", "expert_threshold", "top_any"), "offset")


class DynMoERouter(nn.Module):
    """Which experts a token takes, and with what gates, in fp32 whatever the precision of the weights.

    ``config.router`` has its ``kind`` and, by kind: ``k``; ``form``, ``renormalize``, ``min_experts``, ``max_experts``;
    ``weights``, ``straight_through``, ``scale`` (top_any; None: trained); ``cutoff``; ``num_null``. ``losses`` are
    coefficients of its own losses. ``config.router_overrides`` replaces some of it, as serving may want.
    """

    active: Tensor
    bias: Tensor
    offset: Tensor
    p: Tensor

    def __init__(self, config: DynMoEConfig, num_experts: int) -> None:
        super().__init__()
        overrides = config.router_overrides or {}
        self.settings: dict[str, Any] = config.router | overrides
        self.kind: Any = self.settings["kind"]
        self.fixed_p: float | None = overrides.get("p")  # instead of the one that was trained
        total = num_experts + self.settings.get("num_null", 0)
        limit = self.settings["k"] if self.kind in ("top_k", "null_experts") else self.settings.get("max_experts")
        self.most_experts = min(total if limit is None else limit, num_experts)
        if self.kind == "top_any":
            self.prototypes = nn.Parameter(torch.empty(config.hidden_size, num_experts))
            self.thresholds = nn.Parameter(torch.zeros(num_experts))
            if self.settings.get("scale") is None:
                self.log_scale = nn.Parameter(torch.zeros(1))
        else:
            rows = num_experts + self.settings.get("num_null", 0)
            self.weight = nn.Parameter(torch.empty(rows, config.hidden_size))
        self.register_buffer("active", torch.ones(num_experts, dtype=torch.bool))
        if self.kind in STATE:
            shape = () if self.kind == "top_p" else (num_experts,)
            self.register_buffer(STATE[self.kind], torch.full(shape, self._initial_state, dtype=torch.float32))

    @property
    def _initial_state(self) -> float:
        return float(self.settings.get("p", 0.4)) if self.kind == "top_p" else 0.0

    def initial_values(self) -> dict[str, float]:
        """Of what does not begin at random, by name."""
        values = {"active": 1.0} | ({STATE[self.kind]: self._initial_state} if self.kind in STATE else {})
        return values | {name: 0.0 for name in ("thresholds", "log_scale") if hasattr(self, name)}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DynMoERouter:
        """Moves with the model, but keeps the precision of its buffers."""
        buffers = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in buffers.items():
            if buffer is not None and not buffer.is_meta:
                self._buffers[name] = buffer.to(getattr(self, name).device)
        return self

    def forward(self, x_TD: Tensor) -> tuple[RoutingPlan, Tensor]:
        """The plan, and the logits [T, E] before softmax, sigmoid or ReLU (those of null experts at the end)."""
        settings = self.settings
        limits: Any = {name: settings[name] for name in ("min_experts", "max_experts") if name in settings}
        renormalize: Any = {"renormalize": settings.get("renormalize", False)}
        form = "released" if settings.get("form") == "released" else "paper"
        if self.kind == "top_any":
            scale = settings.get("scale")
            thresholds = self.thresholds.float() + self.offset
            plan = top_any(
                x_TD, self.prototypes, thresholds, self.active, form=form, training=self.training,
                scale=self.log_scale.float().exp() if scale is None else scale,
                straight_through=settings.get("straight_through"), weights=settings.get("weights", "uniform"),
                **renormalize, **limits,
            )  # fmt: skip
            return plan, torch.logit(plan.scores_TE)
        logits_TE = F.linear(x_TD.float(), self.weight.float())
        if self.kind == "top_k":
            plan = top_k(logits_TE, settings["k"], bias_E=self.bias, **renormalize)
        elif self.kind == "top_p":
            p = self.p if self.fixed_p is None else self.fixed_p
            plan = top_p(logits_TE, p, form=form, **renormalize, **limits)
        elif self.kind == "sigmoid":
            base = math.log(settings["cutoff"] / (1.0 - settings["cutoff"]))
            plan = sigmoid_cutoff(logits_TE, torch.sigmoid(base + self.offset), **renormalize, **limits)
        elif self.kind == "expert_threshold":
            plan = expert_threshold(logits_TE, self.offset, **renormalize)
        elif self.kind == "relu":
            plan = relu(logits_TE, max_experts=settings.get("max_experts"))
        elif self.kind == "null_experts":
            plan = null_experts(logits_TE, settings["k"], settings["num_null"], **renormalize)
        else:
            raise ValueError(f"router.kind={self.kind!r} is not known")
        return plan, logits_TE

    def loss(self, plan: RoutingPlan) -> Tensor:
        """Sum of the losses that the model was trained with, times their coefficients."""
        losses = [coefficient * self._loss(name, plan) for name, coefficient in self.settings["losses"].items()]
        return torch.stack(losses).sum() if losses else plan.scores_TE.new_zeros(())

    def _loss(self, name: str, plan: RoutingPlan) -> Tensor:
        settings = self.settings
        counted = None if settings.get("form") == "released" else self.active  # the released code counts every slot
        per_route = settings.get("balance_per_route", False)
        if name != "balance":
            return {
                "diversity": lambda: diversity(self.prototypes, self.active),
                "simplicity": lambda: simplicity(self.prototypes, counted),
                "efficiency": lambda: efficiency(plan, active_E=counted),
                "entropy": lambda: entropy(plan),
                "z": lambda: z_loss(plan),
            }[name]()
        if self.kind == "null_experts":
            return null_balance(plan, settings["k"], settings["num_null"])
        if self.kind != "top_any":
            return load_balance(plan, per_route=per_route)
        if settings.get("form") == "improved":
            return choice_balance(plan, self.active)
        return gate_balance(plan, active_E=counted, per_route=per_route)


class DynMoEMLP(nn.Module):
    """A dense SwiGLU layer."""

    def __init__(self, config: DynMoEConfig, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.act_fn = nn.SiLU()  # a module, which servers find and fuse

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class DynMoEExperts(nn.Module):
    """SwiGLU experts as two stacked parameters."""

    def __init__(self, config: DynMoEConfig, num_experts: int, most_experts: int) -> None:
        super().__init__()
        self.most_experts, self.host = most_experts, ExpertsHost(config)
        hidden, width = config.hidden_size, self.host.width
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden, width))

    def forward(self, x_TD: Tensor, routing_map_TE: Tensor, gates_TE: Tensor) -> Tensor:
        """Sum over the experts of each token of gate times output, [T, D].

        Rounded where training rounds: the gated activation and the sum over experts are fp32 until they are whole. With
        the arguments in this order transformers' ``moe_tp_experts`` cuts the experts over ranks.
        """
        dtype, device = x_TD.dtype, x_TD.device.type
        if torch.is_autocast_enabled(device):  # of operators that are not its own autocast does not know
            dtype = torch.get_autocast_dtype(device)
        rows_TD, w_up_EHD, w_down_EDF = (x.to(dtype) for x in (x_TD, self.gate_up_proj, self.down_proj))
        y_TD = self.host.compute(rows_TD, routing_map_TE, gates_TE, w_up_EHD, w_down_EDF, self.most_experts)
        return y_TD.to(x_TD.dtype)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """For vLLM: takes this rank's part of a checkpoint's tensors; says which there were."""
        return self.host.load(self, weights)


class DynMoEBlock(nn.Module):
    """Route, experts, and the shared expert where there is one."""

    counts_2: Tensor | None

    def __init__(self, config: DynMoEConfig, num_experts: int) -> None:
        super().__init__()
        self.router = DynMoERouter(config, num_experts)
        self.experts = DynMoEExperts(config, num_experts, self.router.most_experts)
        width = config.shared_expert_intermediate_size
        self.shared_expert = DynMoEMLP(config, width) if width else None
        counts = torch.zeros(2, dtype=torch.int64) if config.count_experts else None
        self.register_buffer("counts_2", counts, persistent=False)  # tokens, and the experts that they took

    def forward(self, x_BSD: Tensor, counted_T: Tensor | None, wanted: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The output, and where ``wanted`` the routers' losses, logits and routing map.

        ``counted_T`` is False for padding, which the losses leave out; None: there is none.
        """
        x_TD = x_BSD.flatten(0, 1)
        with torch.autocast(x_TD.device.type, enabled=False):  # which would take the products of routers out of fp32
            plan, logits_TE = self.router(x_TD)
            loss = self.router.loss(plan if counted_T is None else _of_tokens(plan, counted_T)) if wanted else None
        if self.counts_2 is not None:
            self.counts_2.add_(_counts_of(plan.routing_map_TE, counted_T))
        y_TD = self.experts(x_TD, plan.routing_map_TE, plan.gates_TE)
        if self.shared_expert is not None:
            y_TD = y_TD + self.shared_expert(x_TD)
        if loss is None:
            return y_TD.view_as(x_BSD), ()
        shape = (*x_BSD.shape[:2], -1)
        return y_TD.view_as(x_BSD), (loss, logits_TE.view(shape), plan.routing_map_TE.view(shape))


def _counts_of(routing_map_TE: Tensor, counted_T: Tensor | None) -> Tensor:
    """Tokens, and the experts that they take, int64 [2]; on the device, for which nobody waits."""
    if counted_T is None:
        counted_T = routing_map_TE.new_ones(len(routing_map_TE))
    return torch.stack([counted_T.sum(), (routing_map_TE & counted_T[:, None]).sum()])


def _of_tokens(plan: RoutingPlan, kept_T: Tensor) -> RoutingPlan:
    """The plan of some of the tokens."""
    return replace(plan, **{name: value[kept_T] for name, value in vars(plan).items() if value is not None})
