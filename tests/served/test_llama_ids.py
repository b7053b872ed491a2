"""llama.cpp gives the ids of training with every byte-level tokenizer that an export accepts."""

from __future__ import annotations

import json
import random
import subprocess
import unicodedata
from pathlib import Path

import pytest

from data_prep.build import build
from data_prep.recipe import Recipe
from dynmoe.data.tokenizer_files import open_tokenizer
from dynmoe.hf.gguf import write_gguf
from tests.data import languages
from tests.data.languages import EVERYTHING, save
from tests.hf.cases import begin
from tests.hf.gguf_cases import MODELS, SHAPE
from tests.served.environments import python_of, variables
from tests.texts import write_texts

pytestmark = pytest.mark.served

KINDS = ["olmoe", "qwen3", "llama3", "dbrx", "smollm"]
CLIENT = Path(__file__).with_name("llama_client.py")


def some_texts() -> list[str]:
    """Without zero bytes, which its server does not take, and in NFC, to which it does not normalize."""
    draw = random.Random(0)
    characters = "".join(EVERYTHING)
    mixed = ("".join(draw.choices(characters, k=40)) for _ in range(300))
    texts = (unicodedata.normalize("NFC", text).replace("\x00", "") for text in (*EVERYTHING, *mixed))
    return [text for text in texts if text]


def test_ids_are_those_of_training(tmp_path):
    write_texts(tmp_path / "text", 12)
    texts = some_texts()
    own = {}
    for name in KINDS:
        source = save(getattr(languages, name)(), tmp_path / "from" / name)
        recipe = Recipe([str(tmp_path / "text")], tokenizer=str(source), validation_fraction=0.4)
        build(recipe, tmp_path / name, workers=1)
        run = begin(tmp_path / name, tmp_path / f"run_{name}", [*SHAPE, *MODELS["olmoe"]], rows=512).path
        write_gguf(run, tmp_path / f"{name}.gguf")
        own[name] = open_tokenizer(run)
    models = {name: str(tmp_path / f"{name}.gguf") for name in KINDS}
    (tmp_path / "job.json").write_text(json.dumps({"models": models, "prompts": [], "tokens": 1, "texts": texts}))
    done = subprocess.run(
        [python_of("llama"), CLIENT, "job.json"], cwd=tmp_path, text=True, capture_output=True, check=False,
        timeout=240, env=variables(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    said = {found["name"]: found for found in map(json.loads, done.stdout.splitlines())}
    assert said.keys() == own.keys()
    for name, found in said.items():
        assert found["ids"] == [own[name].encode(text) for text in texts]
