"""What a resumed run must keep of the configuration of its checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from dynmoe.config import Config
from dynmoe.errors import ConfigError

# A resumed run may differ from its checkpoint in everything but the latter.
_FREE = ("model.moe.ceiling", "model.moe.at_ceiling")
_FIXED = ("model", "data.weights", "data.sequence_length", "train.seed")
# Before the first sample the data may still be chosen.
_FIXED_BEFORE = ("model",)


def refuse_changes(saved: dict[str, Any], current: dict[str, Any], has_begun: bool = True) -> None:
    """Raises a ConfigError that shows what differs in a field that a resumed run must keep.

    Less is kept by one that has read nothing yet (``has_begun`` is False). What is named in
    ``checkpoint.accept_changes`` may differ, as far as the tensors fit.
    """
    if saved.get("engine") != current["engine"]:
        cure = f"keep it, or convert the run: python -m dynmoe.convert RUN --engine {current['engine']}"
        raise ConfigError("engine", current["engine"], f"the run's checkpoint is of {saved.get('engine')}", cure)
    old, new = dict(flatten(saved)), dict(flatten(current))
    fixed = _FIXED if has_begun else _FIXED_BEFORE
    free = [*_FREE, *current["checkpoint"]["accept_changes"]]
    for name in sorted(old.keys() | new.keys()):
        if _is_in(name, fixed) and not _is_in(name, free) and old.get(name) != new.get(name):
            cure = "keep it, start anew with another run.name, or name it in checkpoint.accept_changes"
            raise ConfigError(name, new.get(name), f"the run's checkpoint has {old.get(name)!r}", cure)


def with_weighting(config: Config, saved: dict[str, Any] | None) -> Config:
    """The configuration with ``eval.weighting`` settled: a run keeps the one that it began with, unless one is given.

    Args:
        config: of this start.
        saved: that of the checkpoint; None where the run begins. Runs that know no weighting count tokens.
    """
    began = "blend" if saved is None else dict(flatten(saved)).get("eval.weighting") or "tokens"
    return dataclasses.replace(config, eval=dataclasses.replace(config.eval, weighting=config.eval.weighting or began))


def _is_in(name: str, sections: Sequence[str]) -> bool:
    return any(name == section or name.startswith(f"{section}.") for section in sections)


def flatten(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Name and value of every field of a nested configuration, such as ``model.router.p``."""
    flat: list[tuple[str, Any]] = []
    for key, value in tree.items():
        name = f"{prefix}{key}"
        flat += flatten(value, f"{name}.") if isinstance(value, dict) else [(name, value)]
    return flat
