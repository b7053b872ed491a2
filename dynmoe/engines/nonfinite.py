"""Diagnosis of a non-finite loss or gradient: rank, layer and parameter of the first occurrence."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dynmoe.config import ModelConfig
from dynmoe.engines.canonical_state import expert_ranges
from dynmoe.errors import UserError
from dynmoe.moe import MoELayer


class GradientWatch:
    """Finds the first non-finite gradient of this rank, in the order of the backward pass.

    After the gradient reduction, non-finite values of one rank are on all ranks; and checking the gradients of every
    forward pass would slow down all steps (``bench gradient_watch``). So only a failed step is computed again and
    checked. All ranks do so together, as they see the same loss and norm.

    Args:
        parameters: parameters with their canonical names.
        layers: MoE layers whose stacked experts are among them.
    """

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], layers: Sequence[MoELayer]) -> None:
        ranges = expert_ranges(layers)
        self._parameters = [(name, own, ranges.get(id(own), (None, 0))[0]) for name, own in parameters]
        self._sums: list[tuple[str, range | None, Tensor]] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Checks the gradients of the passes in this context and replaces them by zeros."""
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
        """Name of the first parameter whose gradient was not finite."""
        return next((_name(*seen) for seen in self._sums if not torch.isfinite(seen[2]).all()), None)

    def first_bad_weight(self) -> str | None:
        """Name of the first parameter with non-finite values."""
        for name, parameter, experts in self._parameters:
            part = getattr(parameter, "ds_tensor", None)  # this rank's under ZeRO 3, which may end within an expert
            if part is not None:
                if not torch.isfinite(part).all():
                    return name
                continue
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
    overflowed: list[int],
    nonfinite_scores: list[int],
    watch: GradientWatch,
    repeat: Callable[[], None],
    step: int,
    loss_is_finite: bool,
    grad_norm: float,
) -> str:
    """Describes what is not finite and where it occurred first; collective, the same text on every rank.

    Args:
        model: configuration of the model.
        overflowed: layers of this rank whose tokens selected more than ``model.moe.max_mean_experts_per_token``.
        nonfinite_scores: layers of this rank with scores that are not finite.
        watch: checks this rank's gradients.
        repeat: computes the forward and backward passes of the step again; collective.
        step: number of the step.
        loss_is_finite: whether the loss of this rank is finite.
        grad_norm: gradient norm over all ranks.

    Raises:
        UserError: the limit of mean experts per token was exceeded, which would happen again in the next step.
    """
    with watch.watching():
        repeat()
    seen: dict[str, Any] = {
        "over": overflowed,
        "scores": nonfinite_scores,
        "loss": loss_is_finite,
        "weight": watch.first_bad_weight(),
        "gradient": watch.first_bad_gradient(),
    }
    everywhere: list[dict[str, Any]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everywhere, seen)
    _check_limit(model, everywhere, step)
    found = []
    if weight := _first(everywhere, "weight"):
        found.append(f"the weights of {weight} are not finite")
    scores = [(layer, where) for layer in model.moe_layers if (where := _ranks(everywhere, "scores", layer))]
    if scores:
        found.append("router scores are not finite in layer {} on rank {}".format(*scores[0]))
    bad_losses = [str(rank) for rank, own in enumerate(everywhere) if not own["loss"]]
    if bad_losses:
        found.append(f"the loss is not finite on rank {', '.join(bad_losses)}")
    if gradient := _first(everywhere, "gradient"):
        found.append(f"the first non-finite gradient is that of {gradient}")
    again = "but loss and gradients were finite on every rank when the step was computed again: suspect the hardware"
    return "; ".join(found) or f"the gradient norm is {grad_norm}, {again}"


def _check_limit(model: ModelConfig, everywhere: list[dict[str, Any]], step: int) -> None:
    """Raises a UserError if tokens exceeded the limit of mean experts per token, which makes everything else NaN."""
    for layer in model.moe_layers:
        if where := _ranks(everywhere, "over", layer):
            lower = "lower model.router.max_experts, " if model.router.has_field("max_experts") else ""
            limit = model.moe.max_mean_experts_per_token
            problem = f"tokens select more experts than model.moe.max_mean_experts_per_token={limit}"
            raise UserError(
                f"step {step}: {problem} allows in layer {layer} on rank {where}; "
                f"raise it, {lower}or drop routes with model.moe.on_overflow=drop"
            )


def _ranks(everywhere: list[dict[str, Any]], key: str, layer: int) -> str:
    return ", ".join(str(rank) for rank, own in enumerate(everywhere) if layer in own[key])


def _first(everywhere: list[dict[str, Any]], key: str) -> str:
    """The first reported entry of ``key``, with all ranks that report the same."""
    text = next((own[key] for own in everywhere if own[key] is not None), None)
    if text is None:
        return ""
    return f"{text} on rank {', '.join(str(rank) for rank, own in enumerate(everywhere) if own[key] == text)}"
