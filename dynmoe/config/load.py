"""From file and command line to a checked configuration, and the list of its fields."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import os
from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dynmoe.config.plain_yaml import parse_yaml
from dynmoe.config.sections import Config
from dynmoe.errors import UserError, first_line

_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
# What values of a field were called in the configurations of older runs.
_FORMER_VALUES = {"data.verify": dict.fromkeys(_TRUE, "once") | dict.fromkeys(_FALSE, "never")}


def load_config(path: str | os.PathLike[str] | None = None, overrides: Sequence[str] = ()) -> Config:
    """Merges defaults, the YAML file at ``path`` and ``key=value`` overrides, in that order.

    Raises:
        UserError: an unreadable file, an unknown key, a wrong type or a value that cannot be used.
    """
    merged = copy.deepcopy(_defaults())
    if path is not None and (given := _read_yaml(Path(path))):
        _merge(merged, "", given, _shown(path))
    for override in overrides:
        _merge(merged, *_read_override(override), "the command line")
    config = OmegaConf.to_object(merged)
    assert isinstance(config, Config)
    return config


def _read_yaml(path: Path) -> dict[Any, Any]:
    try:
        loaded = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"configuration {_shown(path)} cannot be read: {error.strerror}; check the path") from None
    except ValueError as error:
        raise UserError(f"configuration {_shown(path)} is not YAML: {error}; mend the file") from None
    if not isinstance(loaded, dict | None):
        raise UserError(f"configuration {_shown(path)} must be a mapping of sections; see train.py --help")
    return loaded or {}


def _read_override(override: str) -> tuple[str, Any]:
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise UserError(f"{override!r} is not an override; write it as key=value, such as train.steps=100")
    try:
        return key, parse_yaml(value)
    except ValueError as error:
        raise UserError(f"{override!r} cannot be read: {error}; check quotes and brackets") from None


def _merge(merged: DictConfig, key: str, given: Any, source: str) -> None:
    """Puts in what is ``given`` for ``key``, a section or a field; an empty key stands for all."""
    for name, value in _leaves(given, key):
        _check_leaf(name, value, source)
    tree = _with_present_values(key, given)
    for name in reversed(key.split(".") if key else []):
        tree = {name: tree}
    try:
        merged.merge_with(tree)  # OmegaConf.merge copies all fields, which takes 10 ms
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        at = getattr(error, "full_key", None) or next(_leaves(given, key), (source, None))[0]
        raise UserError(f"{at} in {source}: {_shown(first_line(error))}; train.py --help gives its type") from None


def _check_leaf(key: str, value: Any, source: str) -> None:
    """Refuses what OmegaConf would look up elsewhere, or take for something else."""
    kinds, where = _kinds(), f"{_shown(key)} in {source}"
    if not any(name == key or name.startswith(f"{key}.") for name in kinds):
        raise UserError(f"{where}: no such field{_closest(key, list(kinds))}; train.py --help lists them all")
    if isinstance(value, str) and ("${" in value or value == "???"):
        raise UserError(f"{where}: {value!r} is interpolation, which is not supported; write the value")
    if kinds.get(key, "").startswith("bool") and isinstance(value, str) and value.lower() not in _TRUE + _FALSE:
        raise UserError(f"{where}: {value!r} is neither true nor false; write one of them")


def _with_present_values(key: str, given: Any) -> Any:
    """``given`` for ``key`` without values that are called otherwise today."""
    if isinstance(given, dict):
        prefix = f"{key}." if key else ""
        return {name: _with_present_values(f"{prefix}{name}", value) for name, value in given.items()}
    return _FORMER_VALUES.get(key, {}).get(given.lower(), given) if isinstance(given, str) else given


@cache
def _defaults() -> DictConfig:
    """What others are merged into, in a copy."""
    return OmegaConf.structured(Config)


@cache
def _kinds() -> dict[str, str]:
    """The type of every field, in words."""
    return {name: kind for name, kind, *_ in describe_fields()}


def _shown(name: object) -> str:
    """A name as it fits into one line."""
    return str(name) if str(name).isprintable() else repr(str(name))


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(tree, list) and tree:
        for value in tree:
            yield from _leaves(value, prefix)
    else:
        yield prefix, tree


def _closest(key: str, known: list[str]) -> str:
    matches = difflib.get_close_matches(key, known, n=1)
    return f" (did you mean {matches[0]}?)" if matches else ""


def describe_fields(section: type = Config, prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """Yields ``(name, type, default, meaning)`` of every field, for ``train.py --help``."""
    hints = get_type_hints(section)
    for spec in dataclasses.fields(section):
        name, hint = f"{prefix}{spec.name}", hints[spec.name]
        if is_dataclass(hint):
            assert isinstance(hint, type)
            yield from describe_fields(hint, f"{name}.")
            continue
        default = spec.default if spec.default is not dataclasses.MISSING else spec.default_factory()  # type: ignore[operator]
        choices = spec.metadata["choices"]
        kind = "|".join(choices) if choices else _type_name(hint)
        shown = "null" if default is None else str(default).lower() if isinstance(default, bool) else str(default)
        yield name, kind, shown, spec.metadata["meaning"]


def _type_name(hint: Any) -> str:
    inner = [_type_name(argument) for argument in get_args(hint) if argument is not type(None)]
    if getattr(hint, "__origin__", None) is list:
        return f"[{inner[0]}]"
    return f"{inner[0]}|null" if inner else str(hint.__name__)
