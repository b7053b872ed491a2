"""Tasks of lm-evaluation-harness: the scores of its own model of Hugging Face, with the experts of each task."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM

from dynmoe.errors import UserError
from dynmoe.evaluate.harness import open_tasks, rehearse, score_tasks
from dynmoe.evaluate.harness_model import HarnessModel
from dynmoe.evaluate.models import WholeModel
from dynmoe.hf.export import export
from dynmoe.train.scores import EXPERTS
from dynmoe.trained import open_trained
from tests.evaluate.cases import write_tasks
from tests.hf.cases import begin, run_decoder

pytestmark = pytest.mark.usefixtures("away_from_the_hub")
NAMES = ("choices", "rolling", "writing")


@dataclass(frozen=True)
class Exported:
    run: Path
    model: WholeModel
    export: Path
    tasks: dict[str, str]


@pytest.fixture(scope="module")
def exported(corpus_dir, tmp_path_factory) -> Exported:
    folder = tmp_path_factory.mktemp("harness")
    run = begin(corpus_dir, folder / "run", ["model.router.p=0.5", "train.micro_batch=4"]).path
    export(run, folder / "exported", torch.float32)
    model = WholeModel(open_trained(run, torch.device("cpu")))
    return Exported(run, model, folder / "exported", write_tasks(folder / "tasks"))


@pytest.fixture(scope="module")
def theirs(exported) -> dict[str, Any]:
    """What the harness's own model says of the export."""
    model = HFLM(pretrained=str(exported.export), trust_remote_code=True, device="cpu", dtype="float32", batch_size=3)
    tasks = open_tasks([exported.tasks[name] for name in NAMES], "tasks")
    return simple_evaluate(model, tasks=list(tasks.roots), task_manager=tasks.manager)["results"]


def nothing(done: int, of: int) -> None:
    pass


def ours(exported: Exported, *names: str, **options: Any):
    return score_tasks(
        exported.model, open_tasks([exported.tasks[name] for name in names], "tasks"), nothing, **options
    )


def test_scores_are_those_of_the_exported_model_in_the_harness(exported, theirs):
    done = ours(exported, *NAMES)
    assert set(done.scores) == set(NAMES)
    compared = 0
    for name in NAMES:
        for key, value in theirs[name].items():
            metric, comma, filtered = key.partition(",")
            if not comma or isinstance(value, str):
                continue
            figure = metric if filtered == "none" else re.sub(r"^(.*?)(_stderr)?$", rf"\1.{filtered}\2", metric)
            assert done.scores[name][figure] == pytest.approx(value, rel=1e-4), f"{name}: {key}"
            compared += 1
    assert compared >= 7
    assert done.scores["writing"].keys() == {"exact_match.stripped", "exact_match.stripped_stderr", EXPERTS}


def test_texts_are_those_that_the_exported_model_writes(exported, monkeypatch):
    """Their score alone would be 0 of both."""
    task = open_tasks([exported.tasks["writing"]], "tasks").roots[0]
    task.build_all_requests()
    model = HFLM(pretrained=str(exported.export), trust_remote_code=True, device="cpu", dtype="float32", batch_size=5)
    # Of bytes that are no UTF-8, transformers makes other signs.
    tokenizer = exported.model.tokenizer
    monkeypatch.setattr(model, "tok_decode", lambda tokens, **options: tokenizer.decode(tokens) or "</s>")
    mine = HarnessModel(tokenizer, 64, scorer=None, model=exported.model, progress=nothing)
    written = mine.generate_until(task.instances)
    assert written == model.generate_until(task.instances, disable_tqdm=True)
    assert len(set(written)) > 1
    assert any(written)


def test_experts_of_a_task_are_those_of_the_tokens_that_were_computed(exported):
    use = ours(exported, "choices", "rolling").scores
    tokenizer = exported.model.tokenizer
    decoder = exported.model.trained.decoder
    task = open_tasks([exported.tasks["choices"]], "tasks").roots[0]
    task.build_all_requests()
    experts = tokens = 0
    for request in task.instances:
        whole = tokenizer.encode("".join(request.args))
        _, maps = run_decoder(decoder, torch.tensor([whole[:-1]]))
        experts += sum(int(routed.sum()) for routed in maps)
        tokens += len(maps) * (len(whole) - 1)
    assert use["choices"][EXPERTS] == pytest.approx(experts / tokens, rel=1e-12)
    assert use["choices"][EXPERTS] != use["rolling"][EXPERTS]
    group = open_tasks(["both"], "tasks", folder=Path(exported.tasks["both"]).parent)
    both = score_tasks(exported.model, group, nothing).scores
    assert min(own[EXPERTS] for own in use.values()) < both["both"][EXPERTS] < max(own[EXPERTS] for own in use.values())
    assert both["choices"] == use["choices"]


def test_experts_of_written_text_are_counted_once_for_each_token(exported):
    use = ours(exported, "writing").scores["writing"][EXPERTS]
    tokenizer = exported.model.tokenizer
    decoder = exported.model.trained.decoder
    task = open_tasks([exported.tasks["writing"]], "tasks").roots[0]
    task.build_all_requests()
    experts = tokens = 0
    for request in task.instances:
        so_far = tokenizer.encode(request.args[0])
        for number in range(9):
            logits, maps = run_decoder(decoder, torch.tensor([so_far]))
            new = len(so_far) if number == 0 else 1
            experts += sum(int(routed[0, -new:].sum()) for routed in maps)
            tokens += len(maps) * new
            drawn = int(logits[0, -1, : tokenizer.vocab_size].argmax())
            if drawn == tokenizer.eod or "." in tokenizer.decode([*so_far, drawn])[len(request.args[0]) :]:
                break
            so_far.append(drawn)
    assert use == pytest.approx(experts / tokens, rel=1e-12)


def test_scoring_twice_gives_the_same_and_leaves_the_generators_alone(exported):
    tasks = open_tasks([exported.tasks["choices"]], "tasks")
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    first = score_tasks(exported.model, tasks, nothing, shots=2)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert random.getstate() == state[1]
    assert np.random.get_state()[1].tolist() == state[2]
    assert score_tasks(exported.model, tasks, nothing, shots=2).scores == first.scores
    assert first.scores != ours(exported, "choices").scores, "the examples change nothing"
    limited = score_tasks(exported.model, tasks, nothing, limit=3, bootstrap=0)
    assert limited.report["n-samples"]["choices"]["effective"] == 3
    assert not any("stderr" in figure for figure in limited.scores["choices"])


def test_what_is_too_long_loses_its_beginning_and_is_counted(exported):
    done = ours(exported, "choices", shots=6)
    assert done.cut == {"choices": 48}
    assert ours(exported, "choices").cut == {}


def rewritten(exported: Exported, name: str, folder: Path, **changes: Any) -> str:
    task = yaml.safe_load(Path(exported.tasks[name]).read_text()) | changes
    path = folder / "changed.yaml"
    path.write_text(yaml.safe_dump(task))
    return str(path)


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("choices", {"doc_to_choice": ["a " * 200, "b"]}, "but data.sequence_length is 64; remove the task"),
        ("writing", {"generation_kwargs": {"until": [], "max_gen_toks": 64}},
         "task writing: generates up to 64 tokens, but data.sequence_length is 64; name a copy of "
         "its YAML file with a smaller generation_kwargs.max_gen_toks"),
    ],
)  # fmt: skip
def test_requests_that_mean_nothing_are_refused_with_the_task(exported, tmp_path, name, changes, words):
    tasks = open_tasks([rewritten(exported, name, tmp_path, target_delimiter="", **changes)], "tasks")
    with pytest.raises(UserError, match=re.escape(words)):
        score_tasks(exported.model, tasks, nothing)
    with pytest.raises(UserError, match=re.escape(words)):
        rehearse(tasks, exported.model.tokenizer, 64, limit=None)


def test_a_continuation_that_becomes_part_of_the_context_is_refused(exported, tmp_path):
    tokenizer = exported.model.tokenizer
    start, end = next(
        (piece[:place], piece[place:])
        for piece in map(tokenizer.piece, range(300, tokenizer.vocab_size)) for place in range(1, len(piece))
        if piece[0].isalpha() and len(tokenizer.encode(piece)) == len(tokenizer.encode(piece[:place])) == 1
    )  # fmt: skip
    changes = {"doc_to_text": start, "doc_to_choice": [end, "?"], "target_delimiter": ""}
    tasks = open_tasks([rewritten(exported, "choices", tmp_path, **changes)], "tasks")
    words = f"task choices: the continuation '{end}' has no token of its own; start it with a space"
    with pytest.raises(UserError, match=re.escape(words)):
        score_tasks(exported.model, tasks, nothing)


def test_tasks_that_cannot_be_scored_are_refused_by_name(exported, tmp_path, monkeypatch):
    gone = rewritten(exported, "choices", tmp_path, dataset_kwargs={"data_files": {"test": "gone.jsonl"}})
    with pytest.raises(UserError, match=r"--tasks: .*changed.yaml cannot be loaded \(.*gone.jsonl.*\); fix it"):
        open_tasks([gone], "--tasks")
    with pytest.raises(UserError, match=r"eval.tasks: writing generates text.*python -m dynmoe.evaluate"):
        open_tasks([exported.tasks["writing"]], "eval.tasks", generation=False)
    with pytest.raises(UserError, match=r"--tasks: Duplicate task 'choices': found in both .*; list it only once"):
        open_tasks(["both", "choices"], "--tasks", folder=Path(exported.tasks["both"]).parent)
    unsafe = rewritten(exported, "choices", tmp_path, unsafe_code=True)
    with pytest.raises(UserError, match="choices executes code that the model writes"):
        open_tasks([unsafe], "--tasks")


@pytest.mark.slow  # all of the harness's own tasks are read
def test_an_unknown_task_is_told_with_those_of_like_names():
    with pytest.raises(UserError, match=r"--tasks: 'hellaswagg' is not a known task; did you mean .*hellaswag"):
        open_tasks(["hellaswagg"], "--tasks")
