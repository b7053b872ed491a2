"""From file and command line to a checked configuration, and the list of its fields."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dynmoe.config.sections import Config
from dynmoe.errors import UserError, first_line


def load_config(path: str | os.PathLike[str] | None = None, overrides: Sequence[str] = ()) -> Config:
    """Merges defaults, the YAML file at ``path`` and ``key=value`` overrides, in that order.

    Raises:
        UserError: an unreadable file, an unknown key, a wrong type or a value that cannot be used.
    """
    merged = OmegaConf.structured(Config)
    if path is not None:
        merged = _merge(merged, _read_yaml(Path(path)), str(path))
    for override in overrides:
        key, separator, _ = override.partition("=")
        if not separator or not key:
            raise UserError(f"{override!r} is not an override; write it as key=value, such as train.steps=100")
        try:
            given = OmegaConf.from_dotlist([override])
        except Exception as error:
            raise UserError(f"{override!r} cannot be read: {first_line(error)}; check quotes and brackets") from None
        merged = _merge(merged, given, "the command line")
    config = OmegaConf.to_object(merged)
    assert isinstance(config, Config)
    return config


def _read_yaml(path: Path) -> DictConfig:
    try:
        loaded = OmegaConf.load(path)
    except OSError as error:
        raise UserError(f"configuration {path} cannot be read: {error.strerror}; check the path") from None
    except Exception as error:
        raise UserError(f"configuration {path} is not YAML: {first_line(error)}; mend the file") from None
    if not isinstance(loaded, DictConfig):
        raise UserError(f"configuration {path} must be a mapping of sections; see train.py --help")
    return loaded


def _merge(base: DictConfig, given: DictConfig, source: str) -> DictConfig:
    for key, value in _leaves(OmegaConf.to_container(given, resolve=False)):
        if isinstance(value, str) and ("${" in value or value == "???"):
            raise UserError(f"{key} in {source}: {value!r} is interpolation, which is not supported; write the value")
    try:
        merged = OmegaConf.merge(base, given)
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        key = getattr(error, "full_key", None) or next(_leaves(OmegaConf.to_container(given)), (source, None))[0]
        known = [name for name, *_ in describe_fields()]
        if "not in" in str(error) or "Unknown key" in str(error):
            hint = _closest(str(key), known)
            raise UserError(f"{key} in {source}: no such field{hint}; train.py --help lists them all") from None
        raise UserError(f"{key} in {source}: {first_line(error)}; train.py --help gives its type") from None
    assert isinstance(merged, DictConfig)
    return merged


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
