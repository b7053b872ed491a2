"""Errors that are meant for the person at the keyboard."""

from __future__ import annotations

from collections.abc import Collection

_MOST_NAMES = 5


class UserError(Exception):
    """Something the user can mend. Its text is one line: what is wrong, with which value, and the cure."""


def first_line(error: BaseException) -> str:
    """What an error says, in one line; its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def some(words: Collection[str]) -> str:
    """A list in one line that can be read: the first few, and how many more there are."""
    further = len(words) - _MOST_NAMES
    return ", ".join(list(words)[:_MOST_NAMES]) + (f" and {further} more" if further > 0 else "")


class ConfigError(UserError):
    """A configuration field that cannot be used."""

    def __init__(self, field: str, value: object, problem: str, cure: str) -> None:
        super().__init__(f"{field}={value!r}: {problem}; {cure}")
