"""Small pictures of coloured shapes with questions and answers, for vision_language.py.

The test is compositional: some pairs of colour and shape occur in no training picture, and every test question is about
a thing of such a pair. Text without pictures may name every pair.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

import torch
from torch import Tensor

COLOURS = {
    "red": (0.85, 0.15, 0.15), "green": (0.15, 0.7, 0.2), "blue": (0.2, 0.3, 0.9),
    "yellow": (0.9, 0.85, 0.2), "purple": (0.6, 0.2, 0.7), "white": (0.95, 0.95, 0.95),
    "cyan": (0.2, 0.85, 0.9),
}  # fmt: skip
SHAPES = {
    "square": "###### ###### ###### ###### ###### ######",
    "circle": "..##.. .####. ###### ###### .####. ..##..",
    "triangle": "..##.. ..##.. .####. .####. ###### ######",
    "cross": "##..## ###### .####. .####. ###### ##..##",
    "ring": ".####. ##..## #....# #....# ##..## .####.",
    "plus": "..##.. ..##.. ###### ###### ..##.. ..##..",
    "corner": "##.... ##.... ##.... ##.... ###### ######",
}
PLACES = ("top-left", "top", "top-right", "left", "middle", "right", "bottom-left", "bottom", "bottom-right")
NUMBERS = ("none", "one", "two", "three", "four", "five")
KINDS = ("colour", "number", "place", "relation")
GRID = 3
CELL = 8
SIDE = GRID * CELL
THINGS = (3, 4, 5)
NOISE = 0.05
SHADES = 0.1

Pair = tuple[str, str]
PAIRS = [(colour, shape) for colour in COLOURS for shape in SHAPES]
# One shape of each colour, and one colour of each shape.
HELD_OUT = {(colour, list(SHAPES)[number % len(SHAPES)]) for number, colour in enumerate(COLOURS)}


@dataclass(frozen=True)
class Thing:
    """A coloured shape in a cell of the picture."""

    colour: str
    shape: str
    cell: int

    @property
    def pair(self) -> Pair:
        return self.colour, self.shape

    @property
    def place(self) -> str:
        return PLACES[self.cell]


@dataclass(frozen=True)
class Question:
    """A question and its answer of one word; ``about`` are the things that decide it."""

    kind: str
    text: str
    answer: str
    about: tuple[Thing, ...]


@dataclass(frozen=True)
class Scene:
    """Things in different cells, and some questions of each kind."""

    things: tuple[Thing, ...]
    questions: tuple[Question, ...]


def ask(things: Sequence[Thing]) -> list[Question]:
    """All questions about ``things``; the last two kinds are about words that are true of one thing only."""
    found = [Question("colour", f"what colour is at {thing.place}", thing.colour, (thing,)) for thing in things]
    named = {}
    for word in (*COLOURS, *SHAPES):
        about = tuple(thing for thing in things if word in thing.pair)
        found.append(Question("number", f"how many are {word}", NUMBERS[len(about)], about))
        if len(about) == 1:
            named[word] = about[0]
    found += [Question("place", f"where is the {word}", thing.place, (thing,)) for word, thing in named.items()]
    for one, other in permutations(named, 2):
        found += compare(one, named[one], other, named[other])
    return found


def compare(name: str, thing: Thing, other_name: str, other: Thing) -> list[Question]:
    """Questions of how a thing lies to another one, by row and by column, where these differ."""
    down, across = (b - a for a, b in zip(divmod(thing.cell, GRID), divmod(other.cell, GRID), strict=True))
    found = []
    for before, after, distance in (("above", "below", down), ("left-of", "right-of", across)):
        if distance:
            for word, answer in ((before, distance > 0), (after, distance < 0)):
                text = f"is the {name} {word} the {other_name}"
                found.append(Question("relation", text, "yes" if answer else "no", (thing, other)))
    return found


def choose(questions: Sequence[Question], number: int, drawn: random.Random) -> list[Question]:
    """Up to ``number`` questions: each time an answer, so that common ones do not prevail, then a question with it."""
    left = list(questions)
    chosen = []
    while left and len(chosen) < number:
        answer = drawn.choice(sorted({question.answer for question in left}))
        chosen.append(drawn.choice([question for question in left if question.answer == answer]))
        left.remove(chosen[-1])
    return chosen


def draw_scene(drawn: random.Random, split: str, each: int) -> Scene:
    """A random scene of a split, with up to ``each`` questions of each kind.

    ``training`` has known pairs only; ``test`` has every pair, with questions about unseen ones; ``text`` has every
    pair, with any questions, and is not for painting.
    """
    known = [pair for pair in PAIRS if split != "training" or pair not in HELD_OUT]
    while True:
        cells = drawn.sample(range(GRID**2), drawn.choice(THINGS))
        things = tuple(Thing(*drawn.choice(known), cell) for cell in cells)
        found = ask(things)
        if split == "test":
            found = [question for question in found if any(thing.pair in HELD_OUT for thing in question.about)]
        by_kind = [[question for question in found if question.kind == kind] for kind in KINDS]
        if all(by_kind):
            return Scene(things, tuple(own for questions in by_kind for own in choose(questions, each, drawn)))


def draw_scenes(number: int, split: str, each: int, seed: int) -> list[Scene]:
    drawn = random.Random(f"{seed}/{split}")
    return [draw_scene(drawn, split, each) for _ in range(number)]


def paint(scenes: Sequence[Scene], seed: int) -> Tensor:
    """Pictures [B, 3, H, W] from 0 to 1: each thing anywhere in its cell, in a shade of its colour, with noise."""
    generator = torch.Generator().manual_seed(seed)
    masks = {name: torch.tensor([[c == "#" for c in line] for line in rows.split()]) for name, rows in SHAPES.items()}
    pictures = torch.full((len(scenes), 3, SIDE, SIDE), 0.1)
    for picture, scene in zip(pictures, scenes, strict=True):
        for thing in scene.things:
            mask = masks[thing.shape]
            row, column = divmod(thing.cell, GRID)
            top, left = torch.randint(CELL - len(mask) + 1, (2,), generator=generator).tolist()
            window = picture[:, row * CELL + top :, column * CELL + left :][:, : len(mask), : len(mask)]
            shade = torch.tensor(COLOURS[thing.colour]) + SHADES * torch.randn(3, generator=generator)
            window.copy_(torch.where(mask, shade[:, None, None], window))
    return (pictures + NOISE * torch.randn(pictures.shape, generator=generator)).clamp(0, 1)


def names_of_cells(scenes: Sequence[Scene]) -> Tensor:
    """Colour and shape in each cell, int64 [B, cells, 2], counted from 1; 0 in an empty cell."""
    names = torch.zeros(len(scenes), GRID**2, 2, dtype=torch.int64)
    for number, scene in enumerate(scenes):
        for thing in scene.things:
            place = 1 + list(COLOURS).index(thing.colour), 1 + list(SHAPES).index(thing.shape)
            names[number, thing.cell] = torch.tensor(place)
    return names


def vocabulary() -> list[str]:
    """Every word of the questions and answers."""
    rest = "what colour is at the how many are where above below left-of right-of yes no"
    return [*dict.fromkeys([*COLOURS, *SHAPES, *PLACES, *NUMBERS, *rest.split()])]
