"""A field with its meaning and bounds, and the check of them."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import field, is_dataclass
from typing import Any, ClassVar

from dynmoe.errors import ConfigError

Choices = tuple[str, ...]
_BEYOND = 2**63


def option(
    default: Any,
    meaning: str,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    choices: Choices | None = None,
) -> Any:
    """A dataclass field with its meaning and the bounds that :class:`Section` enforces."""
    metadata: dict[str, Any] = {"meaning": meaning, "choices": choices}
    metadata |= {"at_least": at_least, "above": above, "at_most": at_most, "below": below}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def check_multiple_of_8(name: str, value: int) -> None:
    if value % 8:
        cure = "use a multiple of 8"
        raise ConfigError(name, value, "gives rows that grouped matrix products cannot read (16-byte strides)", cure)


class Section:
    """Base of the configuration's dataclasses: checks the bounds of its own fields when it is made."""

    _section: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, spec.name)
            if is_dataclass(value) or value is None:
                continue
            name = f"{self._section}.{spec.name}" if self._section else spec.name
            for item in value if isinstance(value, list) else [value]:
                _check_value(name, item, spec.metadata)


def _check_value(name: str, value: Any, bounds: Any) -> None:
    choices: Choices | None = bounds.get("choices")
    if choices is not None and value not in choices:
        raise ConfigError(name, value, "is not a known choice", f"use one of {', '.join(choices)}")
    if isinstance(value, (list, dict)):
        raise ConfigError(name, value, "is within the list", "give plain values")
    if isinstance(value, str) and not value.isprintable():
        raise ConfigError(name, value, "has characters that cannot be printed", "leave them out")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return
    if isinstance(value, int) and abs(value) >= _BEYOND:
        raise ConfigError(name, value, "is too large", "use a number of 64 bits")
    if not math.isfinite(value):
        raise ConfigError(name, value, "is not a finite number", "give a finite number")
    at_least, above, at_most = bounds.get("at_least"), bounds.get("above"), bounds.get("at_most")
    if at_least is not None and value < at_least:
        raise ConfigError(name, value, "is too small", f"use a value of at least {at_least}")
    if above is not None and value <= above:
        raise ConfigError(name, value, "is too small", f"use a value above {above}")
    below = bounds.get("below")
    if below is not None and value >= below:
        raise ConfigError(name, value, "is too large", f"use a value below {below}")
    if at_most is not None and value > at_most:
        raise ConfigError(name, value, "is too large", f"use a value of at most {at_most}")
