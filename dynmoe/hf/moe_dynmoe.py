"""The MoE layer of an exported model: routers, experts, shared expert. This file ships with the weights.

The routers are in ``routers_dynmoe.py``. Shape letters as in ``modeling_dynmoe.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynmoe.hf.configuration_dynmoe import DynMoEConfig
from dynmoe.hf.serving_dynmoe import ExpertsHost
from dynmoe.routers.base import LossInputs, TensorSpec, at_budget, router_of, without_shape
from dynmoe.routing import RoutingPlan
from dynmoe.routing.scope import TokenScope


def router_buffers(config: DynMoEConfig, num_experts: int) -> dict[str, TensorSpec]:
    """Router state that training updates without gradients, under the names of training."""
    buffers = router_of(config.router).stored_buffers(config.hidden_size, num_experts)
    return {name: tensor for name, tensor in buffers.items() if tensor.export == "tensor"}


class RouterTensors:
    """The state of a router (see ``RouterState``): its tensors under names that include shape letters."""

    active_E: Tensor
    importance_T: Tensor | None = None  # routers that need it are not exported

    def __init__(self, router: DynMoERouter, num_sequences: int = 1) -> None:
        self.training = router.training
        self.scope = TokenScope(num_sequences)
        self._target_experts = router.target_experts
        for ours, theirs in router.names.items():
            # An override replaces a trained value, such as p.
            value = router.overrides.get(theirs, getattr(router, theirs))
            if router.initial[theirs].by_budget and router.spec.budgets:
                value = at_budget(value, router.spec.budgets, router.target_experts or router.spec.budgets[-1])
            setattr(self, ours, value)

    @property
    def target_experts(self) -> float | None:
        return self._target_experts

    def linear(self, x_TD: Tensor, weight_ED: Tensor) -> Tensor:
        return F.linear(x_TD.float(), weight_ED.float())

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)


class DynMoERouter(nn.Module):
    """Selects the experts of each token and computes their gates, in fp32 whatever the precision of the weights.

    ``config.router`` contains ``kind`` and the fields of that router (see ``routers_dynmoe.py``);
    ``config.router_overrides`` replaces some of them for serving.
    """

    active: Tensor

    def __init__(self, config: DynMoEConfig, num_experts: int) -> None:
        super().__init__()
        self.overrides = config.router_overrides or {}
        # Losses count the tokens of one batch, whatever their scope in training. Thresholds are those of evaluation,
        # because batches of fine-tuning may be small and padded.
        fixed = {"balance_scope": "micro_batch", "thresholds": "running"}
        self.spec = router_of(config.router | self.overrides | fixed).resolved
        trained = (config.router.get("budget") or {}).get("experts_per_token")
        self.target_experts: float | None = self.overrides.get("experts_per_token", trained)
        self.most_experts = self.spec.max_experts_per_token(num_experts)
        functions = self.spec.losses
        self.losses = [(factor, functions[name]) for name, factor in self.spec.loss_coefficients().items()]
        self.initial: dict[str, TensorSpec] = {}
        self.names: dict[str, str] = {}
        active = {"active_E": TensorSpec((num_experts,), True, "bool")}
        parameters = self.spec.parameters(config.hidden_size, num_experts)
        for name, tensor in (parameters | active | router_buffers(config, num_experts)).items():
            stem = self.names[name] = without_shape(name)
            self.initial[stem] = tensor
            if name in parameters:
                self.register_parameter(stem, nn.Parameter(torch.full(tensor.shape, tensor.initial or 0.0)))
            else:
                values = torch.full(tensor.shape, tensor.initial or 0, dtype=getattr(torch, tensor.dtype))
                self.register_buffer(stem, values)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DynMoERouter:
        """Moves the router with the model, but keeps the precision of its buffers."""
        buffers = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in buffers.items():
            if buffer is not None and not buffer.is_meta:
                self._buffers[name] = buffer.to(getattr(self, name).device)
        return self

    def forward(self, x_TD: Tensor, num_sequences: int) -> tuple[RoutingPlan, Tensor]:
        """Returns the plan, and the logits [T, E] before softmax, sigmoid or ReLU (null experts come last)."""
        plan = self.spec.plan(RouterTensors(self, num_sequences), x_TD)
        assert plan.logits_TE is not None
        return plan, plan.logits_TE

    def loss(self, plan: RoutingPlan) -> Tensor:
        """Sum of the router's auxiliary losses in training, times their coefficients."""
        inputs = LossInputs(self.spec, RouterTensors(self), plan)
        losses = [factor * function(inputs) for factor, function in self.losses]
        return torch.stack(losses).sum() if losses else plan.scores_TE.new_zeros(())


class DynMoEMLP(nn.Module):
    """A dense SwiGLU layer."""

    def __init__(self, config: DynMoEConfig, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.act_fn = nn.SiLU()  # a module, which servers recognize and fuse

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class DynMoEExperts(nn.Module):
    """SwiGLU experts as two stacked parameters."""

    def __init__(self, config: DynMoEConfig, num_experts: int, most_experts: int) -> None:
        super().__init__()
        self.most_experts = most_experts
        self.host = ExpertsHost(config)
        hidden = config.hidden_size
        width = self.host.width
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden, width))

    def forward(self, x_TD: Tensor, routing_map_TE: Tensor, gates_TE: Tensor) -> Tensor:
        """Gate-weighted sum of the experts' outputs for each token, [T, D].

        Rounds where training does: the gated activation and the sum over experts are accumulated in fp32. transformers'
        ``moe_tp_experts`` requires this order of arguments to split the experts over ranks.
        """
        dtype = x_TD.dtype
        device = x_TD.device.type
        if torch.is_autocast_enabled(device):  # which does not cast the inputs of custom operators
            dtype = torch.get_autocast_dtype(device)
        rows_TD, w_up_EHD, w_down_EDF = (x.to(dtype) for x in (x_TD, self.gate_up_proj, self.down_proj))
        y_TD = self.host.compute(rows_TD, routing_map_TE, gates_TE, w_up_EHD, w_down_EDF, self.most_experts)
        return y_TD.to(x_TD.dtype)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Loads this rank's part of a checkpoint's tensors for vLLM; returns the names of the tensors."""
        return self.host.load(self, weights)


class DynMoEBlock(nn.Module):
    """The router, the experts and, if configured, the shared expert."""

    counts_2: Tensor | None

    def __init__(self, config: DynMoEConfig, num_experts: int) -> None:
        super().__init__()
        self.router = DynMoERouter(config, num_experts)
        self.experts = DynMoEExperts(config, num_experts, self.router.most_experts)
        width = config.shared_expert_intermediate_size
        self.shared_expert = DynMoEMLP(config, width) if width else None
        self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False) if config.shared_expert_gate else None
        counts = torch.zeros(2, dtype=torch.int64) if config.count_experts else None
        self.register_buffer("counts_2", counts, persistent=False)  # tokens and their experts

    def forward(self, x_BSD: Tensor, counted_T: Tensor | None, wanted: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Returns the output and, if ``wanted``, the router's loss, logits and routing map.

        ``counted_T`` is False for padding, which losses and counts exclude; None if there is no padding.
        """
        x_TD = x_BSD.flatten(0, 1)
        with torch.autocast(x_TD.device.type, enabled=False):  # routers stay in fp32
            plan, logits_TE = self.router(x_TD, len(x_BSD))
            loss = self.router.loss(plan if counted_T is None else of_tokens(plan, counted_T)) if wanted else None
        if self.counts_2 is not None:
            self.counts_2.add_(_counts_of(plan.routing_map_TE, counted_T))
        y_TD = self.experts(x_TD, plan.routing_map_TE, plan.gates_TE)
        if self.shared_expert is not None:
            shared_TD = self.shared_expert(x_TD)
            if self.shared_expert_gate is not None:
                shared_TD = self.shared_expert_gate(x_TD).sigmoid() * shared_TD
            y_TD = y_TD + shared_TD
        if plan.local_TD is not None:
            y_TD = y_TD + plan.local_TD
        if loss is None:
            return y_TD.view_as(x_BSD), ()
        if self.router.spec.ADAPTS:
            logits_TE = logits_TE.masked_fill(~self.router.active, -torch.inf)
        shape = (*x_BSD.shape[:2], -1)
        return y_TD.view_as(x_BSD), (loss, logits_TE.view(shape), plan.routing_map_TE.view(shape))


def _counts_of(routing_map_TE: Tensor, counted_T: Tensor | None) -> Tensor:
    """Number of tokens and of their experts, int64 [2], on the device without a synchronization."""
    if counted_T is None:
        counted_T = routing_map_TE.new_ones(len(routing_map_TE))
    return torch.stack([counted_T.sum(), (routing_map_TE & counted_T[:, None]).sum()])


def of_tokens(plan: RoutingPlan, kept_T: Tensor) -> RoutingPlan:
    """The plan restricted to some of the tokens."""
    return replace(plan, **{name: value[kept_T] for name, value in vars(plan).items() if value is not None})
