"""Checks that a resumed run keeps the configuration of its checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from dynmoe.config import Config, ModelConfig, current_name
from dynmoe.config.router_fields import chosen_router, without_foreign_fields
from dynmoe.errors import ConfigError

# Fields and sections that a resumed run must keep, with exceptions; all others may change.
_FIXED = (
    "model",
    "data.weights",
    "data.sequence_length",
    "data.documents",
    "data.packing",
    "train.seed",
    "optimizer.kind",
)
# Those of them that decide which text each sample is.
_ORDER = ("data.weights", "data.sequence_length", "data.packing", "train.seed")
_FREE = ("model.moe.max_mean_experts_per_token", "model.moe.on_overflow", "model.mtp.loss_weight")
# Cannot be accepted: the moments of one optimizer mean nothing to the other.
_NEVER_FREE = ("optimizer.kind",)
# Before the first sample, only these must be kept.
_FIXED_BEFORE = ("model",)
# Fields that keep their first value unless they are given, which is this one in a new run.
_KEPT = {"eval.weighting": "blend", "data.documents": "masked"}
# What runs from before these fields have.
_OLDER = {"eval.weighting": "tokens", "data.documents": "joined", "optimizer.kind": "adamw"}


def check_unchanged(saved: dict[str, Any], current: dict[str, Any], has_begun: bool = True) -> list[str]:
    """Names of the fields that have changed; raises a ConfigError for one that a resumed run must keep.

    A run that has read no sample yet (``has_begun`` is False) must keep fewer fields. Fields named in
    ``checkpoint.accept_changes`` may change, as long as the tensors fit.
    """
    if saved.get("engine") != current["engine"]:
        cure = f"keep it, or convert the run: python -m dynmoe.convert RUN --engine {current['engine']}"
        raise ConfigError("engine", current["engine"], f"the run's checkpoint was saved by {saved.get('engine')}", cure)
    # Older versions saved the fields of all routers.
    router = chosen_router([saved])
    saved = without_foreign_fields(router, saved)
    # A field that the run did not have yet keeps what it did by its default.
    added = flatten(dataclasses.asdict(ModelConfig(router=router())), "model.")
    old = dict(added) | {current_name(name): value for name, value in flatten(saved)}
    new = dict(flatten(current))
    fixed = _FIXED if has_begun else _FIXED_BEFORE
    free = [*_FREE, *map(current_name, current["checkpoint"]["accept_changes"])]
    changed = []
    for name in sorted(old.keys() | new.keys(), key=lambda name: (name != "model.router.kind", name)):
        now = new.get(name)
        # An empty list means the behavior before the field existed.
        before = old.get(name, [] if now == [] else _OLDER.get(name))
        if before == now:
            continue
        can_be_accepted = name not in _NEVER_FREE
        if _is_in(name, fixed) and not (can_be_accepted and _is_in(name, free)):
            cure = "keep it, start a new run with another run.name, or name it in checkpoint.accept_changes"
            if not can_be_accepted:
                cure = "keep it, or start a new run with another run.name"
            raise ConfigError(name, now, f"the run's checkpoint has {before!r}", cure)
        changed.append(name)
    return changed


def describe_new_order(changed: Sequence[str], samples: int) -> str | None:
    """One line if, after a change of these fields, the order of the data is not that of the first ``samples``."""
    names = [name for name in changed if name in _ORDER]
    if not names:
        return None
    problem = "gives another order of the data, of which the first samples count as read"
    return f"{', '.join(names)}: {problem} ({samples:,}): some text is read again, and some is left out"


def with_kept_fields(config: Config, saved: dict[str, Any] | None) -> Config:
    """The configuration with ``eval.weighting`` and ``data.documents``: unless they are given, a run keeps its own.

    Args:
        config: the current configuration.
        saved: configuration of the checkpoint; None for a new run.
    """
    old = {} if saved is None else dict(flatten(saved))
    kept = {name: new if saved is None else old.get(name) or _OLDER[name] for name, new in _KEPT.items()}
    weighting = config.eval.weighting or kept["eval.weighting"]
    documents = config.data.documents or kept["data.documents"]
    return dataclasses.replace(
        config,
        eval=dataclasses.replace(config.eval, weighting=weighting),
        data=dataclasses.replace(config.data, documents=documents),
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
