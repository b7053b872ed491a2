"""A run whose tokenizer is a tokenizer.json: train.py, resume, generation, scores, export."""

from __future__ import annotations

import json

from data_prep.build import build
from data_prep.recipe import Recipe
from dynmoe.data.tokenizer_files import open_tokenizer
from dynmoe.evaluate.harness import open_tasks, score_tasks
from dynmoe.evaluate.models import WholeModel
from dynmoe.generate import generate, stream
from dynmoe.hf.export import export
from dynmoe.model.sampling import Sampling
from dynmoe.trained import open_trained
from tests.data.languages import NAMED, TEXTS, llama3, save
from tests.evaluate.cases import write_tasks
from tests.texts import write_texts
from tests.train.cases import TrainingProcess, read_rows

SPECIAL = "<|end_of_text|>"


def test_from_text_to_export(tmp_path, away_from_the_hub):
    text = tmp_path / "text"
    write_texts(text, 40)
    for number, own in enumerate([*TEXTS.values(), *NAMED]):
        (text / f"more_{number}.txt").write_text(own, newline="")
    source = save(llama3(), tmp_path / "source")
    corpus = tmp_path / "corpus"
    build(Recipe([str(text)], tokenizer=str(source), validation_fraction=0.2), corpus, workers=1)
    fields = ["parallel.expert=1", "model.moe.active_at_start=4", "adaptation.interval=0", "eval.sample_tokens=8"]
    run = tmp_path / "runs" / "tiny"
    for steps in (20, 22):  # the second one resumes
        process = TrainingProcess(corpus, tmp_path / "runs", *fields, f"train.steps={steps}", ranks=1)
        assert process.wait() == 0, process.output()
        assert "Sample of generated text:" in process.output()
    rows = read_rows(run / "metrics.jsonl")
    assert [row["train/step"] for row in rows] == list(range(1, 23))
    assert rows[-1]["train/lm_loss"] < rows[0]["train/lm_loss"]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (run / name).read_bytes() == (corpus / name).read_bytes()
    assert not (run / "tokenizer.model").exists()
    model = open_trained(run)
    own = model.tokenizer
    assert own.sha256 == open_tokenizer(corpus).sha256
    prompt = f"神経 {SPECIAL} é"
    steps = list(generate(model, [prompt], 6, Sampling(0.0), 0))
    ids = own.encode(prompt)
    assert own.eod not in ids
    written = ids + [step.tokens[0] for step in steps if step.tokens[0] is not None]
    assert "".join(stream(model, prompt, iter(steps))) == own.decode(written).rstrip("\ufffd")
    tasks = write_tasks(tmp_path / "tasks")
    opened = open_tasks([tasks[name] for name in ("choices", "rolling", "writing")], "--tasks")
    found = score_tasks(WholeModel(model), opened, lambda done, of: None, limit=2)
    assert found.scores.keys() == {"choices", "rolling", "writing"}
    done = export(run, tmp_path / "out")
    assert done.texts > 0
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert (config["eos_token"], config["split_special_tokens"]) == (SPECIAL, True)
