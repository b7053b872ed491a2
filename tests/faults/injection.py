"""Injection of faults into a rank at a given place, without support by the tested code.

A fault is passed to a training process as ``prepare``: it replaces a function in that process by one that counts its
calls. ``place`` names the function as ``module:Class.function``, with the module that calls it.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def replace(place: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replaces the function at ``place`` by the result of ``make``, which is given the function."""
    module, _, path = place.partition(":")
    owner: Any = importlib.import_module(module)
    *owners, name = path.split(".")
    for part in owners:
        owner = getattr(owner, part)
    plain = inspect.getattr_static(owner, name)
    made = make(plain.__func__ if isinstance(plain, staticmethod) else plain)
    setattr(owner, name, staticmethod(made) if isinstance(plain, staticmethod) else made)


@dataclass(frozen=True)
class Strike:
    """A SIGKILL of the rank before or after the ``call``-th call (counted from 1) of ``place``."""

    place: str
    call: int
    rank: int
    after: bool = False


@dataclass(frozen=True)
class KillInTurn:
    """Kills each attempt of a launch once, by the next of ``strikes``; further attempts are not killed.

    Args:
        strikes: kills in order.
        folder: directory in which each kill leaves a file ``struck_N``.
    """

    strikes: tuple[Strike, ...]
    folder: Path

    def __call__(self, rank: int) -> None:
        number = len(list(self.folder.glob("struck_*")))
        if number < len(self.strikes) and self.strikes[number].rank == rank:
            replace(self.strikes[number].place, functools.partial(self._deadly, number))

    def _deadly(self, number: int, function: Callable[..., Any]) -> Callable[..., Any]:
        strike = self.strikes[number]
        calls = 0

        @functools.wraps(function)
        def deadly(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls != strike.call:
                return function(*arguments, **options)
            if strike.after:
                function(*arguments, **options)
            (self.folder / f"struck_{number}").touch()
            os.kill(os.getpid(), signal.SIGKILL)
            return time.sleep(60)  # until the kernel has killed the process

        return deadly

    def struck(self) -> int:
        return len(list(self.folder.glob("struck_*")))
