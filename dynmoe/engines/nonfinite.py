"""Where a loss or gradient that is not finite came from: by rank, layer and parameter."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dynmoe.config import ModelConfig
from dynmoe.config.routing import KINDS
from dynmoe.engines.plain_state import expert_ranges
from dynmoe.errors import UserError
from dynmoe.moe import MoELayer


class GradientWatch:
    """Finds the gradient of this rank that is the first not to be finite, in the order of the backward pass.

    Once gradients are reduced, all ranks have what one of them did; and to read every gradient of every pass has a
    price in all steps (``bench gradient_watch``). So it is a step that went wrong that is computed once more, and
    watched then. All ranks know of it alike: a loss and a norm are those of all.

    Args:
        parameters: with their names in the plain model.
        layers: MoE layers that hold stacked experts among them.
    """

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], layers: Sequence[MoELayer]) -> None:
        ranges, nothing = expert_ranges(layers), (None, 0)
        self._parameters = [(name, own, ranges.get(id(own), nothing)[0]) for name, own in parameters]
        self._sums: list[tuple[str, range | None, Tensor]] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Around passes whose gradients are looked at, and not kept: each is 0 for whoever comes after."""
        self._sums.clear()
        hooks = [
            parameter.register_hook(functools.partial(self._see, name, experts))
            for name, parameter, experts in self._parameters
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _see(self, name: str, experts: range | None, gradient: Tensor) -> Tensor:
        total = gradient.sum() if experts is None else gradient.flatten(1).sum(dim=1)
        self._sums.append((name, experts, total))
        return torch.zeros_like(total).sum().expand_as(gradient)  # takes no memory

    def first_bad_gradient(self) -> str | None:
        """Name of the first one that was not finite while it was watched."""
        return next((_name(*seen) for seen in self._sums if not torch.isfinite(seen[2]).all()), None)

    def first_bad_weight(self) -> str | None:
        """Name of the first parameter that is not finite itself."""
        for name, parameter, experts in self._parameters:
            flat = parameter.detach().flatten(0 if experts is None else 1)
            if not torch.isfinite(flat).all():
                return _name(name, experts, torch.where(torch.isfinite(flat), 0.0, torch.inf).sum(dim=-1))
        return None


def _name(name: str, experts: range | None, totals: Tensor) -> str:
    if experts is None:
        return name
    bad = [expert for expert, finite in zip(experts, torch.isfinite(totals).tolist(), strict=True) if not finite]
    return f"{name} (expert {', '.join(map(str, bad))})"


def describe_nonfinite(
    model: ModelConfig,
    layers: Sequence[MoELayer],
    watch: GradientWatch,
    repeat: Callable[[], None],
    step: int,
    loss_is_finite: bool,
    grad_norm: float,
) -> str:
    """What is not finite, and where first; collective, the same words on every rank.

    Args:
        model: of the run.
        layers: that this rank holds.
        watch: over this rank's gradients.
        repeat: computes the step's passes once more; collective.
        step: its number.
        loss_is_finite: this rank's own.
        grad_norm: over all ranks.

    Raises:
        UserError: nothing went wrong but a ceiling that was passed, which the next step would pass too.
    """
    with watch.watching():
        repeat()
    seen: dict[str, Any] = {
        "over": [layer.layer for layer in layers if bool(layer.take_over_ceiling())],
        "scores": [layer.layer for layer in layers if not bool(layer.router.take_finite())],
        "loss": loss_is_finite,
        "weight": watch.first_bad_weight(),
        "gradient": watch.first_bad_gradient(),
    }
    everywhere: list[dict[str, Any]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everywhere, seen)

    def ranks(key: str, layer: int) -> str:
        return ", ".join(str(rank) for rank, own in enumerate(everywhere) if layer in own[key])

    for layer in model.moe_layers:  # a ceiling comes first: what lies behind it is made NaN
        if where := ranks("over", layer):
            lower = "lower model.router.max_experts, " if "max_experts" in KINDS[model.router.kind].fields else ""
            problem = f"tokens want more experts than model.moe.ceiling={model.moe.ceiling}"
            raise UserError(
                f"step {step}: {problem} in layer {layer} on rank {where}; "
                f"raise it, {lower}or drop routes with model.moe.at_ceiling=drop"
            )
    found = []
    if weight := _first(everywhere, "weight"):
        found.append(f"the weights of {weight} are not finite")
    scores = [(layer, where) for layer in model.moe_layers if (where := ranks("scores", layer))]
    if scores:
        found.append("router scores are not finite in layer {} on rank {}".format(*scores[0]))
    bad_losses = [str(rank) for rank, own in enumerate(everywhere) if not own["loss"]]
    if bad_losses:
        found.append(f"the loss is not finite on rank {', '.join(bad_losses)}")
    if gradient := _first(everywhere, "gradient"):
        found.append(f"the first gradient that is not finite is that of {gradient}")
    again = "but loss and gradients were finite on every rank when the step was computed again: suspect the hardware"
    return "; ".join(found) or f"the gradient norm is {grad_norm}, {again}"


def _first(everywhere: list[dict[str, Any]], key: str) -> str:
    """What the first rank says that has something to say, with the ranks that say the same."""
    text = next((own[key] for own in everywhere if own[key] is not None), None)
    if text is None:
        return ""
    return f"{text} on rank {', '.join(str(rank) for rank, own in enumerate(everywhere) if own[key] == text)}"
