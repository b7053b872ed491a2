"""The routes of the forward passes of one step on one rank, given by the trace of another run."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

NOT_SELECTED, ROUTED, DROPPED = range(3)


@dataclass(frozen=True)
class ReplayedRoutes:
    """The routes of one layer and forward pass.

    Attributes:
        selected_TE: bool; True where the token selects the expert.
        routed_TE: bool; True where the expert computes the token. The other selected routes are dropped.
    """

    selected_TE: Tensor
    routed_TE: Tensor


class RoutingReplay:
    """Forces the routes of a step; part of :class:`StepState` while a step is replayed.

    A layer without any routes here selects its experts itself.
    """

    def __init__(self) -> None:
        self._kinds: defaultdict[int, dict[int, Tensor]] = defaultdict(dict)

    def add(self, layer: int, micro_batch: int, kinds_TE: Tensor) -> None:
        """Sets the routes of a layer in a forward pass.

        Args:
            layer: index in the decoder.
            micro_batch: index of the forward pass within the step.
            kinds_TE: uint8 on the host: ``NOT_SELECTED``, ``ROUTED`` or ``DROPPED``.
        """
        self._kinds[layer][micro_batch] = kinds_TE.pin_memory() if torch.cuda.is_available() else kinds_TE

    def routes(self, layer: int, micro_batch: int, device: torch.device) -> ReplayedRoutes | None:
        """The routes of a layer in a forward pass, on the device of the model; None if they are the layer's own."""
        if layer not in self._kinds:
            return None
        kinds_TE = self._kinds[layer][micro_batch].to(device, non_blocking=True)
        return ReplayedRoutes(kinds_TE != NOT_SELECTED, kinds_TE == ROUTED)
