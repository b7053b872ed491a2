"""Checks that a resumed run keeps the configuration of its checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from dynmoe.config import Config, current_name
from dynmoe.config.router_fields import chosen_router, without_foreign_fields
from dynmoe.errors import ConfigError

# Fields and sections that a resumed run must keep, with exceptions; all others may change.
_FIXED = ("model", "data.weights", "data.sequence_length", "train.seed")
_FREE = ("model.moe.max_mean_experts_per_token", "model.moe.on_overflow")
# Before the first sample, only these must be kept.
_FIXED_BEFORE = ("model",)


def check_unchanged(saved: dict[str, Any], current: dict[str, Any], has_begun: bool = True) -> None:
    """Raises a ConfigError for a field that a resumed run must keep and that has changed.

    A run that has read no sample yet (``has_begun`` is False) must keep fewer fields. Fields named in
    ``checkpoint.accept_changes`` may change, as long as the tensors fit.
    """
    if saved.get("engine") != current["engine"]:
        cure = f"keep it, or convert the run: python -m dynmoe.convert RUN --engine {current['engine']}"
        raise ConfigError("engine", current["engine"], f"the run's checkpoint was saved by {saved.get('engine')}", cure)
    # Older versions saved the fields of all routers.
    saved = without_foreign_fields(chosen_router([saved]), saved)
    old = {current_name(name): value for name, value in flatten(saved)}
    new = dict(flatten(current))
    fixed = _FIXED if has_begun else _FIXED_BEFORE
    free = [*_FREE, *map(current_name, current["checkpoint"]["accept_changes"])]
    for name in sorted(old.keys() | new.keys(), key=lambda name: (name != "model.router.kind", name)):
        now = new.get(name)
        before = old.get(name, [] if now == [] else None)  # an empty list means the behavior before the field existed
        if _is_in(name, fixed) and not _is_in(name, free) and before != now:
            cure = "keep it, start a new run with another run.name, or name it in checkpoint.accept_changes"
            raise ConfigError(name, now, f"the run's checkpoint has {before!r}", cure)


def with_weighting(config: Config, saved: dict[str, Any] | None) -> Config:
    """The configuration with ``eval.weighting`` resolved: unless it is given, a run keeps its initial one.

    Args:
        config: the current configuration.
        saved: configuration of the checkpoint; None for a new run. Runs without this field weighted by tokens.
    """
    initial = "blend" if saved is None else dict(flatten(saved)).get("eval.weighting") or "tokens"
    return dataclasses.replace(
        config, eval=dataclasses.replace(config.eval, weighting=config.eval.weighting or initial)
    )


def _is_in(name: str, sections: Sequence[str]) -> bool:
    return any(name == section or name.startswith(f"{section}.") for section in sections)


def flatten(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Dotted name (such as ``model.router.p``) and value of every field of a nested configuration."""
    flat: list[tuple[str, Any]] = []
    for key, value in tree.items():
        name = f"{prefix}{key}"
        flat += flatten(value, f"{name}.") if isinstance(value, dict) else [(name, value)]
    return flat
