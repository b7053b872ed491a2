"""Experts that come and go: DynMoE's adaptive process (arXiv 2405.14297, section 3.2), counted in optimizer steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from dynmoe.config.control import AdaptationConfig
from dynmoe.moe.observation import Observation
from dynmoe.moe.routers import Router, TopAnyRouter

if TYPE_CHECKING:
    from dynmoe.moe.layer import MoELayer


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


def prototype_of(unclaimed_D: Tensor) -> Tensor:
    """Prototype of an expert for the tokens that nobody took: the normalised sum of their router inputs."""
    return unclaimed_D / unclaimed_D.norm()


def _window_of(router: Router) -> Tensor:
    """What decides on a layer's experts, fp64: tokens, those that nobody took, the size of the sum of their inputs, the
    tokens that selected each expert, and the experts in use."""
    assert isinstance(router, TopAnyRouter)
    scalars = torch.stack([router.window_tokens, router.window_unclaimed, router.window_unclaimed_D.norm()])
    return torch.cat([scalars, router.window_selected_E, router.active_E.double()])


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
        self, layers: Sequence[MoELayer], observations: Sequence[Observation] | None, step: int
    ) -> list[AdaptationEvent]:
        """Adds what step ``step`` saw to the window; at its end changes the experts and says how.

        A step without ``observations`` was skipped, and adds nothing.
        """
        if not self.records(step):
            return []
        for number, layer in enumerate(layers):
            router = layer.router
            assert isinstance(router, TopAnyRouter)
            windows = (
                router.window_tokens, router.window_selected_E, router.window_unclaimed, router.window_unclaimed_D,
            )  # fmt: skip
            if self._is_first(step):  # whatever an earlier start with another interval left there
                for window in windows:
                    window.zero_()
            if observations is not None:
                seen = observations[number]
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
        assert isinstance(router, TopAnyRouter)
        tokens, unclaimed, size_of_sum = window[:3].tolist()
        selected_E, active_E = window[3:].chunk(2)
        active_E = active_E.bool()
        ranks = layer.context.expert_parallel
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
        router, experts = layer.router, layer.experts
        assert isinstance(router, TopAnyRouter)
        offset = router.offset_E.new_zeros(())
        if self.config.policy == "improved":
            # The median: one threshold out of reach must not put the new one there too.
            others_E = (router.base_E() + router.offset_E)[active_E.to(router.offset_E.device)]
            offset = others_E.median()
        router.offset_E[slot] = offset
        zero = torch.zeros((), device=offset.device)
        self.renewal.renew(router.thresholds_E, (slot,), zero)
        self.renewal.renew(router.prototypes_DE, (slice(None), slot), prototype_of(router.window_unclaimed_D).float())
        if slot in experts.experts:
            local = slot - experts.experts.start
            for parameter, fresh in experts.fresh_weights(slot, f"step{step}"):
                self.renewal.renew(parameter, (local,), fresh)
