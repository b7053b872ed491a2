"""Experts that come and go: DynMoE's adaptive process (arXiv 2405.14297, section 3.2), counted in optimizer steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from dynmoe.config.control import AdaptationConfig
from dynmoe.moe.layer import MoELayer
from dynmoe.moe.router import Router
from dynmoe.routers.base import RouterState
from dynmoe.routing.control_statistics import ControlStatistics


@dataclass(frozen=True)
class AdaptationEvent:
    """An expert that was removed or added after optimizer step ``step``; ``rank`` of the expert-parallel group."""

    step: int
    layer: int
    expert: int
    rank: int
    change: str
    reason: str


class ParameterRenewal(Protocol):
    """What an engine offers for a part of a parameter that starts anew."""

    def renew(self, parameter: nn.Parameter, index: tuple[int | slice, ...], fresh: Tensor) -> None:
        """Puts ``fresh`` into ``parameter[index]`` and its fp32 master, and zeroes the moments there.

        Collective over the ranks that hold a replica of the parameter.
        """


def experts_to_remove(active_E: Tensor, selected_E: Tensor, removal_share: float, keep: int = 1) -> list[int]:
    """Active experts with at most ``removal_share`` of the mean load of active experts, but for the ``keep`` busiest.

    A share of 0 means experts that no token selected. Where no expert was selected at all the thresholds are wrong,
    not the experts, and none is removed.
    """
    active = active_E.nonzero().flatten()
    load = selected_E[active]
    if load.sum() == 0:
        return []
    idle = load <= removal_share * load.mean()
    idle[load.argsort(descending=True, stable=True)[:keep]] = False
    return active[idle].tolist()


def slot_to_fill(active_E: Tensor, num_ranks: int) -> int | None:
    """The first free slot on the rank with the fewest active experts; None where all are taken.

    Slots are spread over ``num_ranks`` in consecutive blocks; on ties the lower rank. With one rank it is the first
    free slot, as in the released code.
    """
    active_RE = active_E.view(num_ranks, -1)
    for rank in active_RE.sum(dim=1).argsort(stable=True).tolist():
        free = (~active_RE[rank]).nonzero().flatten().tolist()
        if free:
            return rank * active_RE.shape[1] + free[0]
    return None


def _window_of(router: Router) -> Tensor:
    """What decides on a layer's experts, fp64: tokens, those that exceeded no threshold, the norm of the sum of their
    inputs, the tokens that selected each expert, and the experts in use."""
    state: RouterState = router
    scalars = torch.stack([state.window_tokens, state.window_unclaimed, state.window_unclaimed_D.norm()])
    return torch.cat([scalars, state.window_selected_E, state.active_E.double()])


class Adaptation:
    """Records routing in windows of optimizer steps, and at the end of each removes and adds experts.

    Sums are over all ranks, so that every replica decides alike. They lie in the routers' buffers, and with them in
    checkpoints. An expert that was added is new: weights, fp32 masters and moments.

    Args:
        config: schedule and policy.
        renewal: the engine's.
        keep: experts that a layer needs at least (for its floor and its budget); no removal goes below.
    """

    def __init__(self, config: AdaptationConfig, renewal: ParameterRenewal, keep: int = 1) -> None:
        self.config, self.renewal, self.keep = config, renewal, keep

    def records(self, step: int) -> bool:
        """Whether optimizer step ``step`` (from 1 on) lies in a recording window."""
        config = self.config
        if config.interval == 0 or (config.until is not None and self._end_of(step) > config.until):
            return False
        return self._end_of(step) - step < config.window

    def changes_at(self, step: int) -> bool:
        """Whether a recording window ends with optimizer step ``step``."""
        return self.records(step) and step == self._end_of(step)

    def _end_of(self, step: int) -> int:
        """The first step at or after ``step`` that ends a window."""
        return -(-step // self.config.interval) * self.config.interval

    def _is_first(self, step: int) -> bool:
        """Whether ``step`` is the first of its recording window."""
        return self._end_of(step) - step == self.config.window - 1

    @torch.no_grad()
    def update(
        self, layers: Sequence[MoELayer], statistics: Sequence[ControlStatistics] | None, step: int
    ) -> list[AdaptationEvent]:
        """Adds the statistics of step ``step`` to the window; at its end changes the experts and returns the changes.

        A step without ``statistics`` was skipped, and adds nothing.
        """
        if not self.records(step):
            return []
        for number, layer in enumerate(layers):
            state: RouterState = layer.router
            windows = (state.window_tokens, state.window_selected_E, state.window_unclaimed, state.window_unclaimed_D)
            if self._is_first(step):  # whatever an earlier start with another interval left there
                for window in windows:
                    window.zero_()
            if statistics is not None:
                seen = statistics[number]
                assert seen.unclaimed is not None
                assert seen.unclaimed_D is not None
                sums = (seen.tokens, seen.selected_E, seen.unclaimed, seen.unclaimed_D)
                for window, own in zip(windows, sums, strict=True):
                    window.add_(own)
        if not layers or not self.changes_at(step):
            return []
        # In one copy for all layers: decisions are taken on the host.
        seen_by_layer = [_window_of(layer.router) for layer in layers]
        copied = torch.cat(seen_by_layer).cpu().split([len(window) for window in seen_by_layer])
        return [event for layer, own in zip(layers, copied, strict=True) for event in self._change(layer, own, step)]

    def _change(self, layer: MoELayer, window: Tensor, step: int) -> list[AdaptationEvent]:
        """Removes and adds experts of a layer; ``window`` is that of :func:`_window_of`, on the host."""
        router, config = layer.router, self.config
        tokens, unclaimed, size_of_sum = window[:3].tolist()
        selected_E, active_E = window[3:].chunk(2)
        active_E = active_E.bool()
        ranks = layer.context.groups.expert_parallel
        per_rank = len(active_E) // ranks
        events = []
        for expert in experts_to_remove(active_E, selected_E, config.removal_share, self.keep):
            load = int(selected_E[expert])
            reason = f"{load} of {int(tokens)} tokens selected it"
            events.append(AdaptationEvent(step, layer.layer, expert, expert // per_rank, "removed", reason))
            active_E[expert] = False
        wanted = unclaimed > config.addition_share * tokens and size_of_sum > 0
        slot = slot_to_fill(active_E, 1 if config.policy == "released" else ranks) if wanted else None
        if slot is not None:
            self._add(layer, active_E, slot, step)
            reason = f"{int(unclaimed)} of {int(tokens)} tokens passed no threshold"
            events.append(AdaptationEvent(step, layer.layer, slot, slot // per_rank, "added", reason))
            active_E[slot] = True
        router.active_E.copy_(active_E)
        return events

    def _add(self, layer: MoELayer, active_E: Tensor, slot: int, step: int) -> None:
        router = layer.router
        at_median = self.config.policy == "improved"
        for name, (index, fresh) in router.spec.new_expert(router, slot, active_E, at_median).items():
            self.renewal.renew(router.get_parameter(name), index, fresh)
        experts = layer.experts
        if slot in experts.experts:
            local = slot - experts.experts.start
            for parameter, fresh in experts.fresh_weights(slot, f"step{step}"):
                self.renewal.renew(parameter, (local,), fresh)
