"""Holds the budget of an exported model while transformers' Trainer fine-tunes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from dynmoe.errors import UserError
from dynmoe.hf.moe_dynmoe import RouterTensors, of_tokens
from dynmoe.routers.base import BudgetStep, router_of
from dynmoe.routing.update_statistics import (
    UpdateStatistics,
    UpdateStatisticsSpec,
    pack_update_statistics,
    unpack_update_statistics,
)

_METHODS = ("pi", "loss_free")


class _HeldRouter:
    """A router of an exported model, with the state of its budget rule, which starts anew.

    Args:
        router: a ``DynMoERouter`` of the modeling code that came with the export.
        settings: the field ``router`` of the export's configuration.
        hidden: the model dimension.
    """

    def __init__(self, router: Any, settings: Mapping[str, Any], hidden: int) -> None:
        self.spec = router_of(settings).resolved
        self.state: Any = RouterTensors(router)
        active_E = self.state.active_E
        for name, tensor in self.spec.buffers(hidden, len(active_E)).items():
            if tensor.export is None and tensor.initial is not None:
                dtype = getattr(torch, tensor.dtype)
                setattr(self.state, name, torch.full(tensor.shape, tensor.initial, dtype=dtype, device=active_E.device))
        self._wanted = UpdateStatisticsSpec(deviation=self.spec.NEEDS_DEVIATION)
        self._sums: Tensor | float = 0.0

    @torch.no_grad()
    def count(self, plan: Any, x_TD: Tensor) -> None:
        """Adds a forward pass to the statistics of the step."""
        compared_TE = self.spec.compared_TE(self.state, plan) if self._wanted.deviation else None
        self._sums = self._sums + pack_update_statistics(plan, x_TD, compared_TE, self._wanted)

    def take(self) -> UpdateStatistics:
        """Returns and clears the statistics of the step."""
        assert isinstance(self._sums, Tensor)
        sums = self._sums
        self._sums = 0.0
        return unpack_update_statistics(sums, len(self.state.active_E), self._wanted)


class HeldBudget(TrainerCallback):
    """Holds the experts per token for which a run was trained, also in fine-tuning: ``callbacks=[HeldBudget()]``.

    Without it, what training moves between steps (p, the offsets of thresholds, biases) stays as it was exported, and
    the number of experts per token drifts with the weights. After each optimizer step the callback applies the rule
    and the gains of training, from the tokens of the step without padding.

    Raises:
        UserError: when training starts: the export has no budget that a rule holds, or several; or there are several
            processes or DataParallel's replicas, whose statistics are not summed.
    """

    def __init__(self) -> None:
        self._routers: list[_HeldRouter] = []
        self._hooks: list[Any] = []
        self._counted_T: Tensor | None = None
        self._budget: Mapping[str, Any] = {}

    @staticmethod
    def fits(config: Any) -> bool:
        """True if the export with this configuration has a budget that the callback can hold."""
        return _method(config.router) in _METHODS and not config.router.get("budgets")

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Attaches to the routers of the model."""
        settings = model.config.router
        self._budget = _budget_of(settings)
        if args.world_size > 1:
            raise UserError(f"world_size={args.world_size}: a budget is held in one process only; start one")
        if args.n_gpu > 1:  # DataParallel, whose replicas are threads with shared hooks
            problem = "a budget is held only if each batch is on one device"
            raise UserError(f"n_gpu={args.n_gpu}: {problem}; set CUDA_VISIBLE_DEVICES to one GPU")
        self._hooks = [model.register_forward_pre_hook(self._see_padding, with_kwargs=True)]
        routers = [module for module in model.modules() if type(module).__name__ == "DynMoERouter"]
        self._routers = [_HeldRouter(router, settings, model.config.hidden_size) for router in routers]
        for router, held in zip(routers, self._routers, strict=True):
            self._hooks.append(router.register_forward_hook(self._counter(held)))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Moves the routers after an optimizer step."""
        seen = [held.take() for held in self._routers]
        first = seen[0].experts_per_token.device
        observed = torch.stack([own.experts_per_token.float().to(first) for own in seen])
        if self._budget["scope"] == "global":
            observed = observed.mean().expand_as(observed)
        gains = {name: self._budget[name] for name in ("method", "proportional", "integral", "rate")}
        target = self._budget["experts_per_token"]
        for held, own, experts_per_token in zip(self._routers, seen, observed, strict=True):
            with torch.no_grad():
                here = experts_per_token.to(own.experts_per_token.device)
                step = BudgetStep(experts_per_token=here, target=target, **gains)
                held.spec.update(held.state, own, step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Detaches from the model."""
        for hook in self._hooks:
            hook.remove()

    def _see_padding(self, model: nn.Module, inputs: Any, named: Mapping[str, Any]) -> None:
        mask = named.get("attention_mask")
        self._counted_T = None if mask is None else mask.bool().flatten()

    def _counter(self, held: _HeldRouter) -> Any:
        def count(router: nn.Module, inputs: tuple[Tensor, int], output: tuple[Any, Tensor]) -> None:
            if router.training:
                counted_T = self._counted_T
                plan = output[0] if counted_T is None else of_tokens(output[0], counted_T.to(inputs[0].device))
                held.count(plan, inputs[0])

        return count


def _method(settings: Mapping[str, Any]) -> str:
    return (settings.get("budget") or {"method": "none"})["method"]


def _budget_of(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """The budget in the field ``router`` of an export."""
    if _method(settings) not in _METHODS:
        problem = f"router.budget.method={_method(settings)}: is not held in fine-tuning"
        raise UserError(f"{problem}; export a run with budget.method=pi or loss_free, or remove HeldBudget")
    if settings.get("budgets"):
        raise UserError(f"router.budgets={settings['budgets']}: only one budget is held in fine-tuning; use []")
    budget: Mapping[str, Any] = settings["budget"]
    return budget
