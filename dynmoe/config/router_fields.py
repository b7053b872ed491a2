"""Selection of the router of a configuration, and treatment of fields of other routers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dynmoe.errors import ConfigError
from dynmoe.fields import check_value
from dynmoe.routers import ROUTERS, RouterSpec, TopP

# Ignored for routers without them, so that routers can be compared by changing only the kind.
_IGNORED = ("k", "p")


def chosen_router(trees: Iterable[Any]) -> type[RouterSpec]:
    """The router of the last ``model.router.kind`` in these nested mappings.

    Raises:
        ConfigError: the kind is unknown.
    """
    kind: Any = TopP.kind
    for tree in trees:
        kind = _router_section(tree).get("kind", kind)
    if not isinstance(kind, str) or kind not in ROUTERS:
        raise ConfigError("model.router.kind", kind, "is not a known choice", f"use one of {', '.join(ROUTERS)}")
    return ROUTERS[kind]


def without_foreign_fields(router: type[RouterSpec], tree: Any) -> Any:
    """The nested mapping without fields of other routers that have their default or are 0.

    Raises:
        ConfigError: a field of another router has another value.
    """
    section = _router_section(tree)
    foreign = {name: owners for name in section if not router.has_field(name) and (owners := _owners(name))}
    for name, owners in foreign.items():
        value = _converted(owners[0], name, section[name])
        if value is not None:
            check_value(f"model.router.{name}", value, owners[0].__dataclass_fields__[name].metadata)
        defaults = [owner.__dataclass_fields__[name].default for owner in owners]
        # 0 disables a loss or limit, which a router without the field does not have anyway.
        harmless = name in _IGNORED or value is None or value in defaults or value == 0
        if not harmless:
            problem = f"is not a field of the {router.kind} router"
            raise ConfigError(f"model.router.{name}", value, problem, "remove it")
    if not foreign:
        return tree
    own = {name: value for name, value in section.items() if name not in foreign}
    return {**tree, "model": {**tree["model"], "router": own}}


def _converted(router: type[RouterSpec], name: str, value: Any) -> Any:
    """A value from YAML (a string), converted to the type of the field."""
    try:
        return OmegaConf.select(OmegaConf.merge(OmegaConf.structured(router), {name: value}), name)
    except OmegaConfBaseException:
        kind = router.__dataclass_fields__[name].type
        raise ConfigError(f"model.router.{name}", value, f"is not of type {kind}", "remove it") from None


def _router_section(tree: Any) -> dict[Any, Any]:
    """The section ``model.router``; empty if it is missing or not a mapping."""
    for part in ("model", "router"):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree if isinstance(tree, dict) else {}


def _owners(name: str) -> list[type[RouterSpec]]:
    return [router for router in ROUTERS.values() if router.has_field(name)]


def describe_router_fields() -> Iterator[tuple[dataclasses.Field[Any], type[RouterSpec], str]]:
    """Yields each field of any router once, with a router that has it, and its meaning (by router if it differs).

    The field is the one of the first router that has it; another default is part of the meaning.
    """
    names = dict.fromkeys(field.name for router in ROUTERS.values() for field in dataclasses.fields(router))
    for name in names:
        owners = _owners(name)
        first = owners[0].__dataclass_fields__[name]
        meanings: dict[str, list[str]] = {}
        for owner in owners:
            own = owner.__dataclass_fields__[name]
            differs = own.default != first.default and name != "kind"
            text = own.metadata["meaning"] + (f" (default {own.default})" if differs else "")
            meanings.setdefault(text, []).append(owner.kind)
        if len(meanings) == 1 and len(owners) == len(ROUTERS):
            yield first, owners[0], first.metadata["meaning"]
        else:
            yield first, owners[0], "; ".join(f"{', '.join(kinds)}: {text}" for text, kinds in meanings.items())
