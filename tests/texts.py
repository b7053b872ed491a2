"""Made-up text with some structure, the same on every machine."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path

import numpy as np


def make_text(number: int, sentences: int = 30) -> str:
    draw = random.Random(number)
    nouns, verbs = (
        ["router", "expert", "token", "layer", "rank", "gate"],
        ["takes", "sends", "drops", "counts", "feeds"],
    )
    lines = [
        f"The {draw.choice(nouns)} {draw.choice(verbs)} {draw.randint(1, 99)} of the {draw.choice(nouns)}s."
        for _ in range(sentences)
    ]
    return f"# Document {number}\n" + "\n".join(lines) + "\n"


def write_texts(folder: Path, documents: int) -> None:
    folder.mkdir(parents=True)
    for number in range(documents):
        (folder / f"{number:03d}.txt").write_text(make_text(number))


def write_gigabytes(path: Path, gigabytes: float) -> None:
    """JSON lines of made-up prose: half a million words that occur as words of a language do, by their rank."""
    random_ = np.random.default_rng(0)
    syllables = [a + b for a in "bcdfghlmnprstv" for b in ("a", "e", "i", "o", "u", "ar", "en", "ist", "or", "um")]
    words = np.array(["".join(random_.choice(syllables, 1 + number % 4)) for number in range(5000)], dtype=object)
    # Composed of two, for the long tail.
    words = np.concatenate([words, random_.choice(words, 500_000) + random_.choice(words, 500_000)])
    chances = 1.0 / np.arange(10, len(words) + 10)
    cumulated = (chances / chances.sum()).cumsum()
    left = int(gigabytes * 1e9)
    with path.open("w") as stream:
        while left > 0:
            drawn = words[np.searchsorted(cumulated, random_.random(200_000))].tolist()
            starts = np.sort(random_.integers(0, len(drawn), 400)).tolist()
            for start, stop in pairwise(starts):
                text = " ".join(drawn[start:stop])
                left -= len(text)
                if text:
                    stream.write(json.dumps({"text": text + ".\n"}) + "\n")
