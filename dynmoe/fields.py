"""Configuration fields with a meaning and bounds, and their validation."""

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
    **further: Any,
) -> Any:
    """A dataclass field with its meaning (a phrase for ``--help``), the bounds that :class:`Section` enforces, and
    ``further`` metadata."""
    metadata: dict[str, Any] = {"meaning": meaning, "choices": choices, **further}
    metadata |= {"at_least": at_least, "above": above, "at_most": at_most, "below": below}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def check_multiple_of_8(name: str, value: int) -> None:
    if value % 8:
        problem = "gives row strides that are not multiples of 16 bytes, which grouped GEMMs require"
        raise ConfigError(name, value, problem, "use a multiple of 8")


class Section:
    """Base class of the configuration's dataclasses, which checks the bounds of its fields on creation."""

    _section: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, spec.name)
            if is_dataclass(value) or value is None:
                continue
            name = f"{self._section}.{spec.name}" if self._section else spec.name
            for item in value if isinstance(value, list) else [value]:
                check_value(name, item, spec.metadata)


def check_value(name: str, value: Any, bounds: Any) -> None:
    choices: Choices | None = bounds.get("choices")
    if choices is not None and value not in choices:
        raise ConfigError(name, value, "is not a known choice", f"use one of {', '.join(choices)}")
    if isinstance(value, (list, dict)):
        raise ConfigError(name, value, "is nested in a list", "use plain values")
    if isinstance(value, str) and not value.isprintable():
        raise ConfigError(name, value, "has unprintable characters", "remove them")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return
    if isinstance(value, int) and abs(value) >= _BEYOND:
        raise ConfigError(name, value, "is too large", "use a number that fits in 64 bits")
    if not math.isfinite(value):
        raise ConfigError(name, value, "is not finite", "use a finite number")
    at_least = bounds.get("at_least")
    above = bounds.get("above")
    below = bounds.get("below")
    at_most = bounds.get("at_most")
    if at_least is not None and value < at_least:
        raise ConfigError(name, value, "is too small", f"use a value of at least {at_least}")
    if above is not None and value <= above:
        raise ConfigError(name, value, "is too small", f"use a value above {above}")
    if below is not None and value >= below:
        raise ConfigError(name, value, "is too large", f"use a value below {below}")
    if at_most is not None and value > at_most:
        raise ConfigError(name, value, "is too large", f"use a value of at most {at_most}")
