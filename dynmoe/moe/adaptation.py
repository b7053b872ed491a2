"""Adds and removes experts: DynMoE's adaptive process (arXiv 2405.14297, section 3.2), counted in optimizer steps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from dynmoe.config.budget import AdaptationConfig
from dynmoe.moe.layer import MoELayer
from dynmoe.moe.router import Router
from dynmoe.routers.base import RouterState
from dynmoe.routing.update_statistics import UpdateStatistics


@dataclass(frozen=True)
class AdaptationEvent:
    """An expert that was removed or added after optimizer step ``step``; ``rank`` is in the expert-parallel group."""

    step: int
    layer: int
    expert: int
    rank: int
    change: str
    reason: str


class ParameterReset(Protocol):
    """Resets a slice of a parameter; implemented by the optimizer state of each engine."""

    def whole(self, module: nn.Module) -> AbstractContextManager[None]:
        """The context in which the parameters of a module can be read; collective like :meth:`reset_slice`."""

    def reset_slice(self, parameter: nn.Parameter, index: tuple[int | slice, ...], fresh: Tensor | None) -> None:
        """Writes ``fresh`` to ``parameter[index]`` and its fp32 master weights, and zeroes the moments there.

        Without ``fresh`` the weights stay. Collective over the ranks that hold a replica of the parameter.
        """


def experts_to_remove(active_E: Tensor, selected_E: Tensor, removal_share: float, min_active: int = 1) -> list[int]:
    """Active experts with at most ``removal_share`` of the mean load, except the ``min_active`` busiest ones.

    With a share of 0 these are the experts that no token selected. If no expert was selected at all, the thresholds are
    wrong rather than the experts, and none is removed.
    """
    active = active_E.nonzero().flatten()
    load = selected_E[active]
    if load.sum() == 0:
        return []
    idle = load <= removal_share * load.mean()
    idle[load.argsort(descending=True, stable=True)[:min_active]] = False
    return active[idle].tolist()


def slot_to_fill(active_E: Tensor, num_ranks: int) -> int | None:
    """The first free slot on the rank with the fewest active experts (ties: the lower rank); None if there is none.

    Each rank has a consecutive block of slots. With one rank it is the first free slot, as in the released code.
    """
    active_RL = active_E.view(num_ranks, -1)
    for rank in active_RL.sum(dim=1).argsort(stable=True).tolist():
        free = (~active_RL[rank]).nonzero().flatten().tolist()
        if free:
            return rank * active_RL.shape[1] + free[0]
    return None


def _read_window(router: Router) -> Tensor:
    """The recorded sums that decide on a layer's experts, fp64: number of tokens, of tokens that exceeded no threshold,
    norm of the sum of their inputs, load of each expert, mask of the active experts."""
    state: RouterState = router
    scalars = torch.stack([state.window_tokens, state.window_unclaimed, state.window_unclaimed_D.norm()])
    return torch.cat([scalars, state.window_selected_E, state.active_E.double()])


def _windows(router: Router) -> tuple[Tensor, ...]:
    """The recorded sums of a layer."""
    state: RouterState = router
    return state.window_tokens, state.window_selected_E, state.window_unclaimed, state.window_unclaimed_D


def _clear(windows: Iterable[Tensor]) -> None:
    for window in windows:
        window.zero_()


class Adaptation:
    """Records routing in windows of optimizer steps; at the end of each window, removes and adds experts.

    Sums are over all ranks, so all replicas decide alike. They are buffers of the routers, so checkpoints contain them.
    An added expert has new weights (unless ``weights`` is ``slot``), fp32 master weights and moments.

    Args:
        config: schedule and policy.
        optimizer_state: of the engine.
        min_active: minimum number of active experts in a layer (for its floor and budget).
    """

    def __init__(self, config: AdaptationConfig, optimizer_state: ParameterReset, min_active: int = 1) -> None:
        self.config = config
        self.optimizer_state = optimizer_state
        self.min_active = min_active

    def records(self, step: int) -> bool:
        """True if optimizer step ``step`` (from 1) is in a recording window."""
        config = self.config
        if config.interval == 0 or (config.until is not None and self._window_end(step) > config.until):
            return False
        return self._window_end(step) - step < config.window

    def changes_at(self, step: int) -> bool:
        """True if a recording window ends with optimizer step ``step``."""
        return self.records(step) and step == self._window_end(step)

    def _window_end(self, step: int) -> int:
        """The first step at or after ``step`` that ends a window."""
        return -(-step // self.config.interval) * self.config.interval

    @torch.no_grad()
    def update(
        self, layers: Sequence[MoELayer], statistics: Sequence[UpdateStatistics] | None, step: int
    ) -> list[AdaptationEvent]:
        """Adds the statistics of step ``step`` to the window; at its end, changes the experts and returns the changes.

        ``statistics`` is None for a skipped step, which adds nothing.
        """
        if not self.records(step):
            return []
        is_first = self._window_end(step) - step == self.config.window - 1
        for number, layer in enumerate(layers):
            windows = _windows(layer.router)
            if is_first:  # a run that was resumed with another interval may have left sums there
                _clear(windows)
            if statistics is not None:
                seen = statistics[number]
                assert seen.unclaimed is not None
                assert seen.unclaimed_D is not None
                sums = (seen.tokens, seen.selected_E, seen.unclaimed, seen.unclaimed_D)
                for window, added in zip(windows, sums, strict=True):
                    window.add_(added)
        if not layers or not self.changes_at(step):
            return []
        # Decisions are made on the host: one copy for all layers.
        by_layer = [_read_window(layer.router) for layer in layers]
        on_host = torch.cat(by_layer).cpu().split([len(window) for window in by_layer])
        events = [
            event
            for layer, window in zip(layers, on_host, strict=True)
            for event in self._change_experts(layer, window, step)
        ]
        for layer in layers:  # a run that is resumed within a longer window must not decide on these steps again
            _clear(_windows(layer.router))
        return events

    def _change_experts(self, layer: MoELayer, window: Tensor, step: int) -> list[AdaptationEvent]:
        """Removes and adds experts of a layer; ``window`` is that of :func:`_read_window`, on the host."""
        config = self.config
        tokens, unclaimed, norm = window[:3].tolist()
        selected_E, active_E = window[3:].chunk(2)
        active_E = active_E.bool()
        ranks = layer.context.groups.expert_parallel
        per_rank = len(active_E) // ranks
        events = []
        for expert in experts_to_remove(active_E, selected_E, config.removal_share, self.min_active):
            load = int(selected_E[expert])
            reason = f"{load} of {int(tokens)} tokens selected it"
            events.append(AdaptationEvent(step, layer.layer, expert, expert // per_rank, "removed", reason))
            active_E[expert] = False
        wanted = unclaimed > config.addition_share * tokens and norm > 0
        slot = slot_to_fill(active_E, 1 if config.policy == "released" else ranks) if wanted else None
        if slot is not None:
            with self.optimizer_state.whole(layer):
                self._add(layer, active_E, slot, step)
            reason = f"{int(unclaimed)} of {int(tokens)} tokens passed no threshold"
            events.append(AdaptationEvent(step, layer.layer, slot, slot // per_rank, "added", reason))
            active_E[slot] = True
        layer.router.active_E.copy_(active_E)
        return events

    def _add(self, layer: MoELayer, active_E: Tensor, slot: int, step: int) -> None:
        """Activates a slot with new weights."""
        router = layer.router
        at_median = self.config.policy == "improved"
        for name, (index, fresh) in router.spec.new_expert(router, slot, active_E, at_median).items():
            self.optimizer_state.reset_slice(router.get_parameter(name), index, fresh)
        experts = layer.experts
        if slot in experts.experts:
            local = slot - experts.experts.start
            for parameter, fresh in experts.fresh_weights(slot, f"step{step}"):
                self.optimizer_state.reset_slice(parameter, (local,), None if self.config.weights == "slot" else fresh)
