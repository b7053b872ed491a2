"""Small pictures of coloured shapes with questions and answers, for vision_language.py.

Some pairs of colour and shape occur in no training picture. Every test question is about a thing of such a pair.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

COLOURS = {
    "red": (0.85, 0.15, 0.15), "green": (0.15, 0.7, 0.2), "blue": (0.2, 0.3, 0.9),
    "yellow": (0.9, 0.85, 0.2), "purple": (0.6, 0.2, 0.7), "white": (0.95, 0.95, 0.95),
}  # fmt: skip
SHAPES = {
    "square": "###### ###### ###### ###### ###### ######",
    "circle": "..##.. .####. ###### ###### .####. ..##..",
    "triangle": "..##.. ..##.. .####. .####. ###### ######",
    "cross": "##..## ###### .####. .####. ###### ##..##",
    "ring": ".####. ##..## #....# #....# ##..## .####.",
}
NUMBERS = ("none", "one", "two", "three", "four", "five", "six")
PLACES = ("first", "second", "third", "fourth")
GRID = len(PLACES)
CELL = 8
THINGS = (4, 5, 6)
KINDS = ("colour", "shape", "number", "place", "relation")

Pair = tuple[str, str]
HELD_OUT = {(colour, list(SHAPES)[number % len(SHAPES)]) for number, colour in enumerate(COLOURS)}
PAIRS = [(colour, shape) for colour in COLOURS for shape in SHAPES]


@dataclass(frozen=True)
class Thing:
    """A coloured shape in a cell of the picture."""

    colour: str
    shape: str
    row: int
    column: int

    @property
    def pair(self) -> Pair:
        return self.colour, self.shape

    @property
    def name(self) -> str:
        return f"the {self.colour} {self.shape}"

    def __str__(self) -> str:
        return f"{self.colour} {self.shape} {PLACES[self.row]} row {PLACES[self.column]} column"


@dataclass(frozen=True)
class Question:
    """A question and its answer, one word; ``about`` are the things that decide it."""

    text: str
    answer: str
    about: tuple[Thing, ...]


@dataclass(frozen=True)
class Scene:
    """Things in different cells, and a question of each kind."""

    things: tuple[Thing, ...]
    questions: dict[str, Question]


def ask(things: Sequence[Thing]) -> dict[str, list[Question]]:
    """All questions about ``things``, by kind. A thing is named by what it does not share with another one."""
    colours = [thing.colour for thing in things]
    shapes = [thing.shape for thing in things]
    pairs = [thing.pair for thing in things]
    named = [thing for thing in things if pairs.count(thing.pair) == 1]
    found: dict[str, list[Question]] = {kind: [] for kind in KINDS}
    for thing in things:
        if shapes.count(thing.shape) == 1:
            found["colour"].append(Question(f"what colour is the {thing.shape} ?", thing.colour, (thing,)))
        if colours.count(thing.colour) == 1:
            found["shape"].append(Question(f"what shape is the {thing.colour} thing ?", thing.shape, (thing,)))
    for word in (*COLOURS, *SHAPES):
        about = tuple(thing for thing in things if word in thing.pair)
        found["number"].append(Question(f"how many are {word} ?", NUMBERS[len(about)], about))
    for thing in named:
        found["place"].append(Question(f"in which row is {thing.name} ?", PLACES[thing.row], (thing,)))
        found["place"].append(Question(f"in which column is {thing.name} ?", PLACES[thing.column], (thing,)))
    for two in combinations(named, 2):
        for first, second in (two, two[::-1]):
            for word, difference in (("above", second.row - first.row), ("before", second.column - first.column)):
                if difference:
                    text = f"is {first.name} {word} {second.name} ?"
                    found["relation"].append(Question(text, "yes" if difference > 0 else "no", (first, second)))
    return found


def choose(questions: Sequence[Question], drawn: random.Random) -> Question:
    """One of the questions: first an answer, so that common answers are not asked for more often, then a question."""
    answer = drawn.choice(sorted({question.answer for question in questions}))
    return drawn.choice([question for question in questions if question.answer == answer])


def draw_scene(drawn: random.Random, test: bool) -> Scene:
    """A random scene of the training or the test split, with a question of each kind."""
    known = [pair for pair in PAIRS if pair not in HELD_OUT]
    while True:
        number = drawn.choice(THINGS)
        pairs = [drawn.choice(PAIRS if test else known) for _ in range(number)]
        cells = drawn.sample(range(GRID * GRID), number)
        things = tuple(Thing(*pair, *divmod(cell, GRID)) for pair, cell in zip(pairs, cells, strict=True))
        found = ask(things)
        if test:  # only what is about an unseen pair
            found = {
                kind: [own for own in questions if any(thing.pair in HELD_OUT for thing in own.about)]
                for kind, questions in found.items()
            }
        if all(found.values()):
            return Scene(things, {kind: choose(questions, drawn) for kind, questions in found.items()})


def draw_scenes(number: int, test: bool, seed: int) -> list[Scene]:
    drawn = random.Random(f"{seed}/{test}")
    return [draw_scene(drawn, test) for _ in range(number)]


def draw(scenes: Sequence[Scene], seed: int) -> Tensor:
    """Pictures [B, 3, H, W] between 0 and 1: each thing anywhere in its cell, in a shade of its colour, with noise."""
    generator = torch.Generator().manual_seed(seed)
    side = GRID * CELL
    masks = {name: torch.tensor([[c == "#" for c in line] for line in rows.split()]) for name, rows in SHAPES.items()}
    pictures = torch.full((len(scenes), 3, side, side), 0.1)
    for picture, scene in zip(pictures, scenes, strict=True):
        for thing in scene.things:
            mask = masks[thing.shape]
            size = len(mask)
            top, left = torch.randint(CELL - size + 1, (2,), generator=generator).tolist()
            rows = slice(thing.row * CELL + top, thing.row * CELL + top + size)
            columns = slice(thing.column * CELL + left, thing.column * CELL + left + size)
            shade = torch.tensor(COLOURS[thing.colour]) + 0.1 * torch.randn(3, generator=generator)
            picture[:, rows, columns] = torch.where(mask, shade[:, None, None], picture[:, rows, columns])
    return (pictures + 0.05 * torch.randn(pictures.shape, generator=generator)).clamp(0, 1)


def name_cells(scenes: Sequence[Scene]) -> Tensor:
    """Colour and shape in each cell, int64 [B, cells, 2], counted from 1; 0 in an empty cell."""
    names = torch.zeros(len(scenes), GRID * GRID, 2, dtype=torch.int64)
    for number, scene in enumerate(scenes):
        for thing in scene.things:
            cell = thing.row * GRID + thing.column
            names[number, cell, 0] = 1 + list(COLOURS).index(thing.colour)
            names[number, cell, 1] = 1 + list(SHAPES).index(thing.shape)
    return names


def words() -> list[str]:
    """Every word of descriptions, questions and answers."""
    rest = "what colour is the shape thing how many are in which row column above before yes no ?"
    return [*dict.fromkeys([*COLOURS, *SHAPES, *NUMBERS, *PLACES, *rest.split()])]
