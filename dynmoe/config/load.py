"""Loading of the configuration from a file and the command line, and the list of its fields."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dynmoe.config.plain_yaml import parse_yaml
from dynmoe.config.router_fields import chosen_router, describe_router_fields, without_foreign_fields
from dynmoe.config.sections import Config
from dynmoe.errors import UserError, first_line
from dynmoe.routers import ROUTERS, RouterSpec, TopP

_TRUE = ("true", "yes", "on", "1")
_FALSE = ("false", "no", "off", "0")
# Former name of a field and its current one. A former name works for one release and is not listed by --help.
_RENAMED = {
    "guard.bad_steps": "guard.max_consecutive_nonfinite_steps",
    "model.moe.at_ceiling": "model.moe.on_overflow",
    "model.moe.ceiling": "model.moe.max_mean_experts_per_token",
    "model.moe.every": "model.moe.moe_layer_freq",
    "model.router.form": "model.router.variant",
}
# Former values of a field and the current ones.
_FORMER_VALUES = {"data.verify": dict.fromkeys(_TRUE, "once") | dict.fromkeys(_FALSE, "never")}


def load_config(path: str | os.PathLike[str] | None = None, overrides: Sequence[str] = ()) -> Config:
    """Merges the defaults, the YAML file at ``path`` and ``key=value`` overrides, in this order.

    Raises:
        UserError: an unreadable file, an unknown field, a wrong type or an invalid value.
    """
    sources = [] if path is None else [([_read_yaml(Path(path))], _shown(path))]
    sources.append(([read_override(override) for override in overrides], "the command line"))
    current = [(tree, source) for trees, source in sources for tree in _current(trees, source)]
    router = chosen_router(tree for tree, _ in current)
    merged = copy.deepcopy(_defaults(router.kind))
    for tree, source in current:
        _merge(merged, without_foreign_fields(router, tree), source)
    config = OmegaConf.to_object(merged)
    assert isinstance(config, Config)
    return config


def current_name(field: str) -> str:
    """The current name of a field that may have been renamed."""
    return _RENAMED.get(field, field)


def _read_yaml(path: Path) -> dict[Any, Any]:
    try:
        loaded = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"configuration {_shown(path)} cannot be read: {error.strerror}; check the path") from None
    except ValueError as error:
        raise UserError(f"configuration {_shown(path)} is not YAML: {error}; fix the file") from None
    if not isinstance(loaded, dict | None):
        raise UserError(f"configuration {_shown(path)} must be a mapping of sections; see train.py --help")
    return loaded or {}


def read_override(override: str) -> dict[Any, Any]:
    """The override as a nested mapping with one field.

    Raises:
        UserError: it is not of the form ``key=value``, or the value is not YAML.
    """
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise UserError(f"{override!r} is not an override; write it as key=value, such as train.steps=100")
    try:
        return _nest(key, parse_yaml(value))
    except ValueError as error:
        raise UserError(f"{override!r} cannot be read: {error}; check quotes and brackets") from None


def _nest(key: str, value: Any) -> Any:
    """``{"a": {"b": value}}`` for the key ``a.b``."""
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


def _current(trees: list[dict[Any, Any]], source: str) -> Iterator[Any]:
    """The nested mappings of one source with the names and values of today, each field checked."""
    for tree in [*trees, *_take_renamed(trees, source)]:
        if tree:
            for name, value in _leaves(tree):
                _check_leaf(name, value, source)
            yield _with_current_values("", tree)


def _merge(merged: DictConfig, tree: Any, source: str) -> None:
    try:
        merged.merge_with(tree)  # OmegaConf.merge copies all fields, which takes 10 ms
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        at = getattr(error, "full_key", None) or next(_leaves(tree))[0]
        value = dict(_leaves(tree)).get(at)
        if _kinds().get(at, "").startswith("[") and isinstance(value, str | int | float):
            raise UserError(f"{at} in {source}: {value!r} is not a list; write it in brackets: [{value}]") from None
        raise UserError(f"{at} in {source}: {_shown(first_line(error))}; train.py --help lists the types") from None


def _take_renamed(trees: list[dict[Any, Any]], source: str) -> list[Any]:
    """Removes renamed fields from ``trees`` and returns them under their current names, with one warning for each.

    Raises:
        UserError: a field is given under both names.
    """
    moved = []
    for old, new in _RENAMED.items():
        values = [value for tree in trees for value in _take(tree, old)]
        if not values:
            continue
        if any(name == new or name.startswith(f"{new}.") for tree in trees for name, _ in _leaves(tree)):
            raise UserError(f"{old} in {source}: is the former name of {new}, which is also given; remove {old}")
        if os.environ.get("RANK", "0") == "0":
            text = f"{old} is now called {new}; rename it, as the next release no longer accepts the former name"
            warnings.warn_explicit(text, FutureWarning, source, 0)  # line 0: the warning is one line of output
        moved.append(_nest(new, values[-1]))
    return moved


def _take(tree: Any, field: str) -> tuple[Any, ...]:
    """Removes a field and the sections that this leaves empty; its value, if it is there."""
    name, _, rest = field.partition(".")
    if not isinstance(tree, dict) or name not in tree:
        return ()
    taken = _take(tree[name], rest) if rest else (tree[name],)
    if taken and (not rest or not tree[name]):
        del tree[name]
    return taken


def _check_leaf(key: str, value: Any, source: str) -> None:
    """Refuses unknown fields and values that OmegaConf would interpolate or convert."""
    kinds = _kinds()
    where = f"{_shown(key)} in {source}"
    if not any(name == key or name.startswith(f"{key}.") for name in kinds):
        raise UserError(f"{where}: no such field{_closest(key, list(kinds))}; train.py --help lists them all")
    if isinstance(value, str) and ("${" in value or value == "???"):
        raise UserError(f"{where}: {value!r} is an interpolation, which is not supported; write the value")
    if kinds.get(key, "").startswith("bool") and isinstance(value, str) and value.lower() not in _TRUE + _FALSE:
        raise UserError(f"{where}: {value!r} is not a boolean; use true or false")


def _with_current_values(key: str, given: Any) -> Any:
    """A copy of ``given``, the value of ``key``, with former values replaced by the current ones."""
    if isinstance(given, dict):
        prefix = f"{key}." if key else ""
        return {name: _with_current_values(f"{prefix}{name}", value) for name, value in given.items()}
    return _FORMER_VALUES.get(key, {}).get(given.lower(), given) if isinstance(given, str) else given


@cache
def _defaults(kind: str) -> DictConfig:
    """The default configuration with this router; merge into a copy of it."""
    defaults = OmegaConf.structured(Config)
    defaults.model.router = OmegaConf.structured(ROUTERS[kind])
    return defaults


def _kinds() -> dict[str, str]:
    return _kinds_with(tuple(ROUTERS))


@cache
def _kinds_with(routers: tuple[str, ...]) -> dict[str, str]:
    """The type of every field, in words, with the fields of these routers."""
    return {name: kind for name, kind, *_ in describe_fields()}


def _shown(name: object) -> str:
    """The name, quoted if it contains unprintable characters."""
    return str(name) if str(name).isprintable() else repr(str(name))


def _leaves(tree: Any) -> Iterator[tuple[str, Any]]:
    """Yields the dotted name and value of every field of a nested mapping; the items of a list one by one."""
    waiting = [("", tree)]  # no recursion: an override may have thousands of dots
    while waiting:
        prefix, value = waiting.pop()
        if isinstance(value, dict) and value:
            waiting += [(f"{prefix}.{key}" if prefix else str(key), own) for key, own in reversed(value.items())]
        elif isinstance(value, list) and value:
            waiting += [(prefix, own) for own in reversed(value)]
        else:
            yield prefix, value


def _closest(key: str, known: list[str]) -> str:
    matches = difflib.get_close_matches(key, known, n=1)
    return f" (did you mean {matches[0]}?)" if matches else ""


def describe_fields(section: type = Config, prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """Yields ``(name, type, default, meaning)`` of every field, for ``train.py --help``."""
    hints = get_type_hints(section)
    for spec in dataclasses.fields(section):
        name = f"{prefix}{spec.name}"
        hint = hints[spec.name]
        if hint is RouterSpec:
            for field, router, meaning in describe_router_fields():
                yield _describe(f"{name}.{field.name}", field, get_type_hints(router)[field.name], meaning)
            continue
        if is_dataclass(hint):
            assert isinstance(hint, type)
            yield from describe_fields(hint, f"{name}.")
            continue
        yield _describe(name, spec, hint, spec.metadata["meaning"])


def _describe(name: str, spec: dataclasses.Field[Any], hint: Any, meaning: str) -> tuple[str, str, str, str]:
    default = spec.default if spec.default is not dataclasses.MISSING else spec.default_factory()  # type: ignore[operator]
    choices = spec.metadata["choices"]
    if name == "model.router.kind":
        choices = tuple(ROUTERS)
        default = TopP.kind
    kind = "|".join(choices) if choices else _type_name(hint)
    shown = "null" if default is None else str(default).lower() if isinstance(default, bool) else str(default)
    return name, kind, shown, meaning


def _type_name(hint: Any) -> str:
    inner = [_type_name(argument) for argument in get_args(hint) if argument is not type(None)]
    if getattr(hint, "__origin__", None) is list:
        return f"[{inner[0]}]"
    return f"{inner[0]}|null" if inner else str(hint.__name__)
