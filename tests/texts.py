"""Made-up text with some structure, the same on every machine."""

from __future__ import annotations

import random
from pathlib import Path


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
