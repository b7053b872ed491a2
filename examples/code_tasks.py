"""Classification tasks of different difficulty, made of the source code of Python's standard library.

Nothing is downloaded. A passage for training and a passage for the test are never from the same file. Every label is
equally frequent, so the accuracy of guessing is one over the number of labels.
"""

import ast
import random
import sysconfig
import textwrap
from collections.abc import Callable
from functools import cache
from itertools import chain
from pathlib import Path
from typing import NamedTuple

LIBRARY = Path(sysconfig.get_paths()["stdlib"])
NOT_READ = {"site-packages", "dist-packages", "test", "tests", "idlelib", "encodings", "pydoc_data", "lib2to3"}
PACKAGES = ("asyncio", "email", "multiprocessing", "unittest", "xml")
LINES = 4  # at least
CHARACTERS = 200  # about 60 tokens
CLOSES = {")": "(", "]": "[", "}": "{"}

Passage = tuple[str, ...]
Sample = dict[str, str | int]
Change = Callable[[Passage, random.Random], Passage | None]


class Split(NamedTuple):
    """The passages of code and of prose of some files, by file."""

    code: dict[Path, list[Passage]]
    prose: dict[Path, list[Passage]]


def files(held_out: bool) -> list[Path]:
    """Source files of the library, below it: every third is held out for the test."""
    found = sorted(path.relative_to(LIBRARY) for path in LIBRARY.rglob("*.py"))
    read = [path for path in found if not NOT_READ & set(path.parts)]
    return [path for number, path in enumerate(read) if (number % 3 == 2) == held_out]


def separate(source: str) -> tuple[list[str], list[str]]:
    """Lines of code, without comments, and lines of docstrings."""
    lines = source.splitlines()
    prose = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text is not None:
                prose += text.splitlines()
                literal = node.body[0]
                lines[literal.lineno - 1 : literal.end_lineno] = [""] * (literal.end_lineno - literal.lineno + 1)
    return [line for line in lines if not line.lstrip().startswith("#")], prose


def passages(lines: list[str]) -> list[Passage]:
    """Consecutive lines of at most ``CHARACTERS`` together, blank lines and common indentation removed."""
    groups: list[list[str]] = [[]]
    for line in filter(str.strip, lines):
        if len("\n".join([*groups[-1], line])) > CHARACTERS:
            groups.append([])
        groups[-1].append(line.rstrip())
    return [tuple(textwrap.dedent("\n".join(group)).split("\n")) for group in groups if len(group) >= LINES]


@cache
def read(held_out: bool) -> Split:
    """All passages of the files for training, or of those that are held out."""
    split = Split({}, {})
    for path in files(held_out):
        code, prose = separate((LIBRARY / path).read_text(encoding="utf-8"))
        split.code[path] = passages(code)
        split.prose[path] = passages(prose)
    return split


def swap_lines(passage: Passage, draw: random.Random) -> Passage | None:
    """Swaps two different lines of equal indentation; None if there are none."""
    pairs = [
        (first, second)
        for second in range(len(passage))
        for first in range(second)
        if passage[first] != passage[second] and indentation(passage[first]) == indentation(passage[second])
    ]
    if not pairs:
        return None
    first, second = draw.choice(pairs)
    changed = list(passage)
    changed[first], changed[second] = changed[second], changed[first]
    return tuple(changed)


def indentation(line: str) -> str:
    return line[: len(line) - len(line.lstrip())]


def is_closed(passage: Passage) -> bool:
    """True if every bracket is closed by its counterpart, those in strings included."""
    waiting: list[str] = []
    for letter in "\n".join(passage):
        if letter in CLOSES.values():
            waiting.append(letter)
        elif letter in CLOSES and (not waiting or waiting.pop() != CLOSES[letter]):
            return False
    return not waiting


def remove_bracket(passage: Passage, draw: random.Random) -> Passage | None:
    """Removes one closing bracket; None if there is none, or if the brackets were not closed before."""
    text = "\n".join(passage)
    places = [place for place, letter in enumerate(text) if letter in CLOSES]
    if not places or not is_closed(passage):
        return None
    place = draw.choice(places)
    return tuple((text[:place] + text[place + 1 :]).split("\n"))


def of_kinds(split: Split, draw: random.Random) -> list[list[Passage]]:
    """Passages of code, and passages of docstrings."""
    return [list(chain.from_iterable(own.values())) for own in split]


def of_packages(split: Split, draw: random.Random) -> list[list[Passage]]:
    """Passages of code of each of ``PACKAGES``."""
    return [
        [passage for path, own in split.code.items() if path.parts[0] == package for passage in own]
        for package in PACKAGES
    ]


def changed_by(change: Change) -> Callable[[Split, random.Random], list[list[Passage]]]:
    """Passages of code as they are, and other passages after a change; only such that can be changed."""

    def make(split: Split, draw: random.Random) -> list[list[Passage]]:
        both = [(own, change(own, draw)) for own in dict.fromkeys(chain.from_iterable(split.code.values()))]
        possible = [(before, after) for before, after in both if after is not None]
        draw.shuffle(possible)
        half = len(possible) // 2
        return [[before for before, _ in possible[:half]], [after for _, after in possible[half:]]]

    return make


class Task(NamedTuple):
    """A question with its number of answers; ``make`` returns all passages of each answer."""

    question: str
    labels: int
    make: Callable[[Split, random.Random], list[list[Passage]]]

    @property
    def chance(self) -> float:
        return 1 / self.labels


TASKS = {
    "kind": Task("is it code or a docstring?", 2, of_kinds),
    "package": Task("which of five packages is it from?", len(PACKAGES), of_packages),
    "bracket": Task("is a closing bracket missing?", 2, changed_by(remove_bracket)),
    "order": Task("are two lines of equal indentation swapped?", 2, changed_by(swap_lines)),
}


def samples(task: str, held_out: bool, count: int) -> list[Sample]:
    """``count`` passages of a task at most, as text and label, the same in every call.

    Labels are equally frequent, and no passage occurs twice.
    """
    draw = random.Random(f"{task}, {held_out}")
    by_label = [list(dict.fromkeys(own)) for own in TASKS[task].make(read(held_out), draw)]
    each = min(count // len(by_label), *map(len, by_label))
    found = [
        {"text": "\n".join(passage), "label": label}
        for label, own in enumerate(by_label)
        for passage in draw.sample(own, each)
    ]
    draw.shuffle(found)
    return found
