"""Which router a configuration chooses, and what it may say of the others' fields."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dynmoe.errors import ConfigError
from dynmoe.fields import check_value
from dynmoe.routers import ROUTERS, RouterSpec, TopP

# Whoever compares routers changes the kind alone: these stay where they do not matter.
_KEPT = ("k", "p")


def chosen_router(trees: Iterable[Any]) -> type[RouterSpec]:
    """The router that the last ``model.router.kind`` in these nested mappings names.

    Raises:
        ConfigError: there is no such router.
    """
    kind: Any = TopP.kind
    for tree in trees:
        kind = _router_section(tree).get("kind", kind)
    if not isinstance(kind, str) or kind not in ROUTERS:
        raise ConfigError("model.router.kind", kind, "is not a known choice", f"use one of {', '.join(ROUTERS)}")
    return ROUTERS[kind]


def without_foreign_fields(router: type[RouterSpec], tree: Any) -> Any:
    """A nested mapping without fields of other routers that have their default, or are 0.

    Raises:
        ConfigError: a field of another router is set.
    """
    section = _router_section(tree)
    foreign = {name: owners for name in section if not router.has_field(name) and (owners := _owners(name))}
    for name, owners in foreign.items():
        value = _converted(owners[0], name, section[name])
        check_value(f"model.router.{name}", value, owners[0].__dataclass_fields__[name].metadata)
        defaults = [owner.__dataclass_fields__[name].default for owner in owners]
        # 0 says that there is no such loss, or limit, which is true of every router without it.
        harmless = name in _KEPT or value is None or value in defaults or value == 0
        if not harmless:
            problem = f"has no meaning for the {router.kind} router"
            raise ConfigError(f"model.router.{name}", value, problem, "remove it")
    if not foreign:
        return tree
    kept = {name: value for name, value in section.items() if name not in foreign}
    return {**tree, "model": {**tree["model"], "router": kept}}


def _converted(router: type[RouterSpec], name: str, value: Any) -> Any:
    """A value from YAML, which has strings only, as the field has it."""
    try:
        return OmegaConf.select(OmegaConf.merge(OmegaConf.structured(router), {name: value}), name)
    except OmegaConfBaseException:
        kind = router.__dataclass_fields__[name].type
        raise ConfigError(f"model.router.{name}", value, f"is not of type {kind}", "remove it") from None


def _router_section(tree: Any) -> dict[Any, Any]:
    """The section ``model.router``; empty where it is not there, or not a mapping."""
    for part in ("model", "router"):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree if isinstance(tree, dict) else {}


def _owners(name: str) -> list[type[RouterSpec]]:
    return [router for router in ROUTERS.values() if router.has_field(name)]


def describe_router_fields() -> Iterator[tuple[dataclasses.Field[Any], type[RouterSpec], str]]:
    """Every field of any router once, with a router that has it, and its meaning by router where that differs."""
    fields = {field.name: field for router in ROUTERS.values() for field in dataclasses.fields(router)}
    for name, field in fields.items():
        owners = _owners(name)
        meanings: dict[str, list[str]] = {}
        for owner in owners:
            meanings.setdefault(owner.__dataclass_fields__[name].metadata["meaning"], []).append(owner.kind)
        if len(meanings) == 1 and len(owners) == len(ROUTERS):
            yield field, owners[-1], field.metadata["meaning"]
        else:
            yield field, owners[-1], "; ".join(f"{', '.join(kinds)}: {text}" for text, kinds in meanings.items())
