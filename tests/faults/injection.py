"""Faults that strike within a rank at a chosen place; the product knows nothing of them.

Each is given to a training process as ``prepare``: it replaces a function of the product, in that process only, by one
that counts its calls. ``place`` names a function as ``module:Class.function`` by where it is called from.
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
    """Puts what ``make`` makes of the function at ``place`` there."""
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
    """One kill: SIGKILL to the rank itself in the ``call``-th call (from 1 on) of ``place``, before or after it."""

    place: str
    call: int
    rank: int
    after: bool = False


@dataclass(frozen=True)
class KillInTurn:
    """Every attempt of a launch is struck once, each by the next of ``strikes``; then attempts live.

    Args:
        strikes: in order.
        folder: where attempts leave what struck them: ``struck_N``.
    """

    strikes: tuple[Strike, ...]
    folder: Path

    def __call__(self, rank: int) -> None:
        number = len(list(self.folder.glob("struck_*")))
        if number < len(self.strikes) and self.strikes[number].rank == rank:
            replace(self.strikes[number].place, functools.partial(self._deadly, number))

    def _deadly(self, number: int, function: Callable[..., Any]) -> Callable[..., Any]:
        strike, calls = self.strikes[number], 0

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
            return time.sleep(60)  # until the kernel has done it

        return deadly

    def struck(self) -> int:
        return len(list(self.folder.glob("struck_*")))
