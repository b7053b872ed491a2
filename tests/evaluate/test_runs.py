"""Scores of runs: by the command, and while training."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch

from dynmoe.data.corpus import Corpus, by_domain
from dynmoe.errors import ConfigError, UserError
from dynmoe.evaluate import main
from dynmoe.evaluate.harness import open_tasks, score_tasks
from dynmoe.evaluate.models import WholeModel
from dynmoe.report import figures
from dynmoe.report.page import write_report
from dynmoe.report.runs import Run, read_run
from dynmoe.train.run_directory import RunDirectory
from dynmoe.train.scores import EXPERTS, scores_of
from dynmoe.trained import open_trained
from tests.engines.cases import config_for
from tests.evaluate.cases import write_tasks
from tests.faults.cases import MEGATRON
from tests.train.cases import TrainingProcess, curve, parameter_hashes, read_rows
from tests.train.test_wandb import read_offline


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> dict[str, str]:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture
def run(undisturbed, tmp_path):
    shutil.copytree(undisturbed[0], tmp_path / "tiny")
    return tmp_path / "tiny"


def call(monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, arguments), "--device", "cpu"])
    main()


def test_scores_join_the_metrics_their_views_and_the_report(run, tasks, monkeypatch, capsys):
    config = run / "config.yaml"
    before = curve(run / "metrics.jsonl")
    config.write_text(config.read_text().replace("wandb: disabled", "wandb: offline"))
    call(monkeypatch, run, "--tasks", tasks["choices"], f"{tasks['rolling']},{tasks['writing']}", "--limit", 3)
    printed = capsys.readouterr().out
    after = read_rows(run / "metrics.jsonl")
    scores = scores_of(after[-1])
    assert set(scores) == {"tasks/choices", "tasks/rolling", "tasks/writing", "domains/prepared"}
    assert all(0 < own[EXPERTS] < 4 for own in scores.values())
    assert [{name: value for name, value in row.items() if not name.startswith(("eval/tasks", "eval/domains"))}
            for row in curve(run / "metrics.jsonl")] == before  # fmt: skip
    for name, own in scores.items():
        assert re.search(rf"{name} +\S+ +\S+( ± \S+)? +{own[EXPERTS]:.2f}\n", printed), printed
    kept = json.loads((run / "evaluations" / "step_00000040.json").read_text())
    assert kept["scores"] == {name: after[-1][name] for name in kept["scores"]}
    assert kept["harness"]["n-samples"]["choices"] == {"original": 12, "effective": 3}
    _, shown = read_offline(run)
    assert [json.loads(row[name]) for row in shown for name in row if name == "eval/tasks/choices/acc"] == [
        scores["tasks/choices"]["acc"]
    ]
    read = read_run(run)
    assert read.problems == []
    bars = figures.experts_by_task([read]).data[0]
    assert dict(zip(bars.x, bars.y, strict=True)) == {name: own[EXPERTS] for name, own in scores.items()}
    assert figures.scores([read]) is None, "one row is no curve"
    write_report([read, Run(run, "other")], run / "report.html")
    page = re.sub(r"\s+", " ", (run / "report.html").read_text())
    loss = scores["domains/prepared"]
    assert (
        f"<td>domains/prepared</td><td>loss</td><td>{loss['loss']:.4g}</td><td>{loss[EXPERTS]:.2f}</td>"
        "<td>–</td><td>–</td>"
    ) in page


def test_another_output_leaves_the_run_as_it_is_even_while_it_trains(run, tasks, monkeypatch, tmp_path):
    directory = RunDirectory(run)
    directory.claim()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(
        UserError, match=r"another job trains in .*tiny; wait for it, or leave the run unchanged with --out"
    ):
        call(monkeypatch, run)
    call(monkeypatch, run, "--output", tmp_path / "scores.json", "--no-domains", "--tasks", tasks["choices"])
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    directory.release()
    scores = json.loads((tmp_path / "scores.json").read_text())["scores"]
    assert set(scores_of(scores)) == {"tasks/choices"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--limit", "2"], "--limit=2: needs tasks; name some with --tasks"),
        (["--limit", "0", "--tasks", "a.yaml"], "--limit=0: is too small; use 1 or more"),
        (["--shots", "-1", "--tasks", "a.yaml"], "--shots=-1: is too small; use 0 or more"),
        (["--no-domains"], "--no-domains: nothing to evaluate"),
        (["--include", "nowhere"], "--include=nowhere: is not a directory"),
        (["--output", "nowhere/a.json"], "--output=nowhere/a.json: nowhere is not a directory"),
        (["--corpora", "nowhere"], "nowhere holds no prepared corpus (manifest.json is missing)"),
    ],
)
def test_what_means_nothing_is_refused(run, monkeypatch, arguments, words):
    with pytest.raises(UserError, match=re.escape(words)):
        call(monkeypatch, run, *arguments)


def test_a_corpus_of_another_tokenizer_is_refused(run, monkeypatch, tmp_path):
    from data_prep.build import build
    from data_prep.recipe import Recipe
    from tests.texts import write_texts

    write_texts(tmp_path / "text", documents=20)
    build(Recipe([str(tmp_path / "text")], vocab_size=390, validation_fraction=0.3), tmp_path / "other", workers=1)
    with pytest.raises(
        UserError, match=r"--corpora: other was encoded with a different tokenizer than the run; prepare it"
    ):
        call(monkeypatch, run, "--corpora", tmp_path / "other")


@pytest.mark.parametrize("engine", ["deepspeed", pytest.param("megatron", marks=pytest.mark.slow)])
def test_scores_while_training_are_those_of_the_checkpoint_and_change_nothing(
    undisturbed, corpus_dir, tasks, tmp_path, engine
):
    fields = [] if engine == "deepspeed" else MEGATRON
    plain = undisturbed[0]
    if fields:
        alone = TrainingProcess(corpus_dir, tmp_path / "plain", *fields)
        assert alone.wait() == 0, alone.output()
        plain = tmp_path / "plain" / "tiny"
    named = [tasks["choices"], tasks["rolling"]]
    scored = [f"eval.tasks=[{','.join(named)}]", "eval.domains=true", "eval.scores_interval=15"]
    process = TrainingProcess(corpus_dir, tmp_path / "runs", *fields, *scored)
    assert process.wait() == 0, process.output()
    run = tmp_path / "runs" / "tiny"
    rows = [row for row in read_rows(run / "metrics.jsonl") if scores_of(row)]
    assert [row["train/step"] for row in rows] == [15, 30, 40]
    assert parameter_hashes(run, 40) == parameter_hashes(plain, 40), "scoring changed the training"
    known = read_rows(plain / "metrics.jsonl")[0].keys() - {"train/step_time_s"}
    assert [{k: row[k] for k in known & row.keys()} for row in curve(run / "metrics.jsonl")] == [
        {k: row[k] for k in known & row.keys()} for row in curve(plain / "metrics.jsonl")
    ]
    model = WholeModel(open_trained(run, torch.device("cpu")))
    afterwards = score_tasks(model, open_tasks(named, "--tasks"), lambda done, of: None, bootstrap=0).scores
    inside = scores_of(rows[-1])
    assert set(inside) == {"tasks/choices", "tasks/rolling", "domains/prepared"}
    for name, own in afterwards.items():
        assert inside[f"tasks/{name}"] == pytest.approx(own, rel=1e-4)
    assert inside["domains/prepared"]["loss"] == pytest.approx(rows[-1]["eval/loss"], rel=1e-6)
    lines = figures.scores([read_run(run)])
    assert [list(trace.x) for trace in lines.data] == [[15, 30, 40]] * len(lines.data)
    assert f"{inside['tasks/choices'][EXPERTS]:.2f}" in process.output()


@pytest.mark.parametrize(
    ("name", "length", "words"),
    [
        ("writing", 32, "error: eval.tasks: writing generates text, which takes too long during training"),
        ("choices", 2, "error: task choices: a continuation has 3 tokens, but data.sequence_length is 2"),
    ],
)
def test_tasks_that_cannot_be_scored_are_reported_before_training(corpus_dir, tasks, tmp_path, name, length, words):
    fields = [f"eval.tasks=[{tasks[name]}]", f"data.sequence_length={length}"]
    process = TrainingProcess(corpus_dir, tmp_path / "runs", *fields)
    assert process.wait() != 0
    assert words in process.output()
    assert not (tmp_path / "runs" / "tiny").exists()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (["eval.scores_interval=5"], "eval.scores_interval=5: there is nothing to score; name eval.tasks"),
        (["eval.limit=5"], "eval.limit=5: there are no tasks to limit"),
    ],
)
def test_fields_that_mean_nothing_are_refused(fields, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        config_for(*fields)


def test_a_corpus_that_is_named_twice_is_one_domain(corpus_dir, tmp_path):
    twice = [Corpus.open(corpus_dir), Corpus.open(corpus_dir)]
    assert list(by_domain(twice)) == ["prepared"]
    shutil.copytree(corpus_dir, tmp_path / "prepared")
    namesakes = [*twice, Corpus.open(tmp_path / "prepared")]
    assert list(by_domain(namesakes)) == [str(corpus_dir), str(tmp_path / "prepared")]


def test_a_training_without_scores_loads_nothing_heavy_for_them():
    script = "import sys, dynmoe.evaluate.training; print([n for n in ('torch', 'lm_eval') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert done.stdout == "[]\n"


def test_tasks_need_the_harness(monkeypatch):
    import importlib.util

    config = config_for("eval.tasks=[arc_easy]")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"eval.tasks=\['arc_easy'\]: requires lm_eval, which is not installed"):
        config.check_world(1)
