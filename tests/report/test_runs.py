"""What is missing or damaged in a run is said; the rest is shown."""

from __future__ import annotations

import json
import shutil
import sys
from html import escape
from pathlib import Path

import pytest

from dynmoe.__main__ import console_script
from dynmoe.config import load_config
from dynmoe.errors import UserError
from dynmoe.report import main
from dynmoe.report.page import write_report
from dynmoe.report.runs import read_run, read_runs


@pytest.fixture
def run_dir(undisturbed, tmp_path) -> Path:
    """A copy that may be damaged."""
    source, _ = undisturbed
    return Path(shutil.copytree(source, tmp_path / "tiny", ignore=shutil.ignore_patterns("checkpoints", "traces")))


def test_a_finished_run_has_no_problem(run_dir):
    run = read_run(run_dir)
    assert run.problems == []
    assert [row["train/step"] for row in run.rows] == list(range(1, 41))
    assert [entry["train/step"] for entry in run.histograms] == list(range(4, 41, 4))
    assert {event["change"] for event in run.events} == {"added", "removed"}
    assert run.config is not None
    assert run.config.logging.interval == 1
    assert run.layers == [0, 1]


def test_incidents_are_told_by_kind_with_the_first_of_them(run_dir):
    bad = "not finite"
    entries = [(3, bad, "rank 1 was first"), (7, "spike", "loss 9"), (8, bad, "rank 0 was first"), (9, 1, "")]
    lines = [json.dumps({"step": step, "kind": kind, "text": text}) for step, kind, text in entries]
    (run_dir / "incidents.jsonl").write_text("\n".join(lines) + "\n")
    assert read_run(run_dir).problems == [
        "incidents.jsonl: 1 of 4 lines skipped (damaged): line 4",
        "steps skipped as not finite: 2, the first at step 3 (rank 1 was first)",
        "steps skipped as loss spikes: 1, the first at step 7 (loss 9)",
    ]


def edit(path: Path, change) -> None:
    path.write_text(change(path.read_text()))


def without(name: str):
    return lambda run: (run / name).unlink()


def replace_lines(name: str, numbers: tuple[int, ...], text: str):
    def change(run: Path) -> None:
        lines = (run / name).read_text().splitlines()
        for number in numbers:
            lines[number - 1] = text
        (run / name).write_text("\n".join(lines) + "\n")

    return change


def in_progress(run: Path) -> None:
    """A rank is just writing a row."""
    (run / "outcome.json").unlink()
    edit(run / "metrics.jsonl", lambda text: "".join(text.splitlines(keepends=True)[:7]) + '{"train/step": 8, "tr')


def of_one_step(run: Path) -> None:
    for name in ("metrics.jsonl", "histograms.jsonl"):
        edit(run / name, lambda text: text.splitlines(keepends=True)[0])


def failed(run: Path) -> None:
    (run / "outcome.json").write_text('{"status": "failed", "step": 3, "error": "UserError: step 3: the loss is nan"}')


DAMAGES = {
    "garbage": (
        replace_lines("metrics.jsonl", (3, 9), "\x00\x01 not JSON"),
        ["metrics.jsonl: 2 of 40 lines skipped (damaged): line 3, 9", "lacks 2 rows, the first after step 2"],
        38,
    ),
    "not numbers": (
        replace_lines("metrics.jsonl", (5,), '{"train/step": 5, "train/lm_loss": "low"}'),
        ["1 of 40 lines skipped (damaged): line 5", "lacks 1 rows, the first after step 4"],
        39,
    ),
    "repeated": (
        replace_lines("metrics.jsonl", (6,), '{"train/step": 5, "train/lm_loss": 1.0}'),
        ["1 of 40 lines skipped (out of order or repeated): line 6", "lacks 1 rows, the first after step 5"],
        39,
    ),
    "NaN": (replace_lines("metrics.jsonl", (40,), '{"train/step": 40, "train/lm_loss": NaN}'), [], 40),
    "hostile numbers": (
        lambda run: [
            replace_lines("metrics.jsonl", (place,), line)(run)
            for place, line in (
                (10, '{"train/step": NaN}'),
                (20, '{"train/step": 1e999}'),
                (25, "[" * 100_000),
                (30, f'{{"train/step": 30, "train/loss": {"9" * 400}}}'),
                (35, '{"train/step": 35.5}'),
            )
        ],
        ["5 of 40 lines skipped (damaged): line 10, 20, 25, 30, 35", "lacks 5 rows, the first after step 9"],
        35,
    ),
    "a step far away": (
        replace_lines("metrics.jsonl", (40,), '{"train/step": 1000000000000}'),
        ["lacks 999999999960 rows, the first after step 39"],
        40,
    ),
    "no metrics": (without("metrics.jsonl"), ["metrics.jsonl cannot be read (No such file or directory)"], 0),
    "empty metrics": (lambda run: edit(run / "metrics.jsonl", lambda text: ""), ["no step was logged yet"], 0),
    "no histograms": (without("histograms.jsonl"), ["histograms.jsonl cannot be read"], 40),
    "damaged histograms": (
        replace_lines("histograms.jsonl", (1, 2), '{"train/step": 4, "layers": {"0": {"load": [1], "active": []}}}'),
        ["histograms.jsonl: 2 of 10 lines skipped (damaged): line 1, 2"],
        40,
    ),
    "no configuration": (without("config.yaml"), ["config.yaml cannot be read"], 40),
    "another configuration": (
        lambda run: edit(run / "config.yaml", lambda text: text + "surplus: 1\n"), ["surplus"], 40,
    ),
    "damaged events": (
        replace_lines("events.jsonl", (1,), '{"step": 8, "layer": "x", "expert": 1, "change": "added"}'),
        ["events.jsonl: 1 of "],
        40,
    ),
    "inactive experts": (
        replace_lines(
            "histograms.jsonl",
            (1,),
            '{"train/step": 4, "layers": {"0": {"experts_per_token": [1], "load": [1], "active": [0]}}}',
        ),
        ["histograms.jsonl: 1 of 10 lines skipped (damaged): line 1"],
        40,
    ),
    "no events": (without("events.jsonl"), [], 40),
    "outcome cut off": (lambda run: (run / "outcome.json").write_text("{"), ["outcome.json cannot be read"], 40),
    "in progress": (
        in_progress,
        ["1 of 8 lines skipped (damaged): line 8", "or died without recording why; its last row is step 7 of 40"],
        7,
    ),
    "one step": (of_one_step, ["there is only one row: curves are points"], 1),
    "preempted": (
        lambda run: (run / "outcome.json").write_text('{"status": "preempted", "step": 40}'),
        ["the run stopped on request after step 40, and can be resumed"],
        40,
    ),
    "failed": (failed, ["the run failed: UserError: step 3: the loss is nan"], 40),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_report_says_what_is_missing_and_shows_the_rest(run_dir, damage):
    change, sentences, num_rows = DAMAGES[damage]
    change(run_dir)
    run = read_run(run_dir)
    assert len(run.rows) == num_rows
    assert len(run.problems) == len(sentences), run.problems
    for sentence, problem in zip(sentences, run.problems, strict=True):
        assert sentence in problem
    write_report([run], run_dir / "report.html")
    page = (run_dir / "report.html").read_text()
    for problem in run.problems:
        assert escape(problem, quote=False) in page.replace("&#39;", "'").replace("&#34;", '"')
    assert ('id="figure-loss"' in page) == (num_rows > 0)
    assert ('id="figure-load_0"' in page) == (damage != "no histograms")


def test_a_run_that_began_elsewhere_or_logged_at_another_interval_is_sound(run_dir):
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for steps in (range(20, 41), [*range(2, 20, 4), *range(20, 41)], [1, 40]):
        (run_dir / "metrics.jsonl").write_text("".join(json.dumps(rows[step - 1]) + "\n" for step in steps))
        assert [problem for problem in read_run(run_dir).problems if "lacks" in problem] == (
            ["metrics.jsonl lacks 38 rows, the first after step 1"] if steps == [1, 40] else []
        )


def test_the_headline_counts_experts_as_they_are(run_dir):
    run = read_run(run_dir)
    assert run.config is not None
    for model, words in (
        (["model.moe.experts_by_layer=[5,9]", "model.layers=2"], "5 to 9 experts per layer, top_p router, finished"),
        (["model.moe.experts=0"], "4 layers, dense, finished"),
    ):
        run.config = load_config(None, model)
        write_report([run], run_dir / "report.html")
        assert words in (run_dir / "report.html").read_text()


def test_no_run_is_refused_in_one_line(tmp_path):
    with pytest.raises(UserError, match=r"nowhere: contains no run \(neither config.yaml nor metrics.jsonl\)"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(UserError, match="contains no run"):
        read_run(tmp_path)


def test_runs_of_the_same_name_go_by_their_paths(run_dir, tmp_path):
    other = Path(shutil.copytree(run_dir, tmp_path / "elsewhere" / "tiny"))
    assert [run.name for run in read_runs([run_dir, other])] == [str(run_dir), str(other)]
    assert [run.name for run in read_runs([run_dir])] == ["tiny"]


def test_the_command_writes_one_page_and_prints_where(run_dir, tmp_path, monkeypatch, capsys):
    other = Path(shutil.copytree(run_dir, tmp_path / "other"))
    edit(other / "config.yaml", lambda text: text.replace("seed: 0", "seed: 1"))
    in_progress(other)
    (other / "histograms.jsonl").unlink()

    output = tmp_path / "both.html"
    monkeypatch.setattr(sys, "argv", ["dynmoe", "report", str(run_dir), str(other), "--output", str(output)])
    console_script()
    said = capsys.readouterr().out
    assert f"Report: {output}" in said
    assert "its last row is step 7 of 40" in said
    page = output.read_text()
    assert "<td>train.seed</td><td>0</td><td>1</td>" in page
    assert "http://" not in page.replace("http://www.w3.org", "").split("<h2>")[0].split("<script>")[0]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["{run}/nowhere"], "nowhere: contains no run"),
        (["{run}", "--output", "{run}/missing/x.html"], "missing is not a directory; create it, or use another path"),
        (["tokens", "{run}", "--tokens", "0"], "--tokens=0: is too small"),
        (["tokens", "{run}", "--output", "{run}/outcome.html"], "its data would overwrite outcome.json"),
        (["tokens", "{run}", "--output", "{run}/tokenizer.html"], "its data would overwrite tokenizer.json"),
        (["tokens", "{run}", "--output", "{run}/x.json"], "use another name that ends in .html"),
        (["tokens", "{run}", "--text", "{run}/none.txt"], "none.txt: cannot be read"),
        (["tokens", "{run}"], "no valid checkpoint"),
        (["dashboard", "{run}/nowhere"], "config.yaml cannot be read"),
    ],
)
def test_the_command_refuses_in_one_line(run_dir, monkeypatch, arguments, sentence):
    monkeypatch.setattr(sys, "argv", ["dynmoe report", *(argument.format(run=run_dir) for argument in arguments)])
    with pytest.raises(UserError) as caught:
        main()
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_rows_and_histograms_are_json_that_anyone_can_read(run_dir):
    for name in ("metrics.jsonl", "histograms.jsonl"):
        for line in (run_dir / name).read_text().splitlines():
            assert json.loads(line)["train/step"] > 0
