"""Errors that are meant for the person at the keyboard."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can mend. Its text is one line: what is wrong, with which value, and the cure."""


def first_line(error: BaseException) -> str:
    """What an error says, in one line; its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class ConfigError(UserError):
    """A configuration field that cannot be used."""

    def __init__(self, field: str, value: object, problem: str, cure: str) -> None:
        super().__init__(f"{field}={value!r}: {problem}; {cure}")
