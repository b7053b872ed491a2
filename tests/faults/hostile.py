"""Random corruption of files, which must be read correctly or refused in one line."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from hypothesis import currently_in_test_context, event, settings
from hypothesis import strategies as st

from dynmoe.errors import UserError

Result = TypeVar("Result")
_TIMEOUT_S = 20.0  # inputs take milliseconds, but the machine may be busy


@contextmanager
def in_bounded_time() -> Iterator[None]:
    """Raises a TimeoutError if the context takes longer than the timeout."""

    def too_late(*_: Any) -> None:
        raise TimeoutError(f"not finished after {_TIMEOUT_S:.0f} s")

    before = signal.signal(signal.SIGALRM, too_late)
    signal.setitimer(signal.ITIMER_REAL, _TIMEOUT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def attempt(action: Callable[[], Result]) -> Result | None:
    """The result of an action; None if it is refused by a UserError, which must be one line."""
    refusal = None
    try:
        with in_bounded_time():
            result = action()
    except UserError as error:
        refusal = str(error)
    if currently_in_test_context():
        event("accepted" if refusal is None else "refused")
    if refusal is None:
        return result
    assert len(refusal.splitlines()) == 1, refusal
    return None


def fuzz(examples: int) -> settings:
    """A fixed set of ``examples`` inputs; with HYPOTHESIS_PROFILE=fuzz, 10,000 random ones."""
    return settings(max_examples=examples) if settings.get_current_profile_name() == "project" else settings()


@st.composite
def damaged(draw: st.DrawFn, content: bytes, words: Sequence[bytes] = (b"\0", b"\xff\xff\xff\xff")) -> bytes:
    """``content`` after one to four changes: bytes flipped, cut, removed, swapped or overwritten; words inserted."""
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(content)))
        stop = min(len(content), start + draw(st.sampled_from((1, 1, 2, 4, 8, 60, 1000))))
        before = content[:start]
        hit = content[start:stop]
        after = content[stop:]
        word = draw(st.sampled_from(words) | st.binary(max_size=8))
        other = draw(st.integers(0, len(content)))
        flipped = bytes(byte ^ 1 << start % 8 for byte in hit)
        content = draw(st.sampled_from((
            before + flipped + after, before, before + after, before + word + hit + after,
            before + word + content[start + len(word) :], before + content[other : other + 40] + after,
            after + hit + before,
        )))  # fmt: skip
    return content


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.sampled_from((10**400, 2**64)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3), max_leaves=6,
)  # fmt: skip
