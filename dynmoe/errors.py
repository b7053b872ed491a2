"""Errors that are shown to the user without a traceback."""

from __future__ import annotations

from collections.abc import Collection

_MOST_NAMES = 5


class UserError(Exception):
    """A problem that the user can fix. Its text is one line: field, value, problem, fix."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def some(words: Collection[str]) -> str:
    """The first few words of a list, and the number of further ones, in one line."""
    further = len(words) - _MOST_NAMES
    return ", ".join(list(words)[:_MOST_NAMES]) + (f" and {further} more" if further > 0 else "")


class ConfigError(UserError):
    """A configuration field with an invalid value. ``fact`` is the text without the cure."""

    def __init__(self, field: str, value: object, problem: str, cure: str) -> None:
        self.fact = f"{field}={value!r}: {problem}"
        super().__init__(f"{self.fact}; {cure}")
