"""TensorBoard, the console, and warnings about a row."""

from __future__ import annotations

import dataclasses
import re

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dynmoe.config import load_config
from dynmoe.config.budget import BudgetConfig
from dynmoe.config.logging import LoggingConfig
from dynmoe.train.console import RunConsole
from dynmoe.train.health import find_problems, new_problems
from dynmoe.train.run_directory import RunDirectory
from dynmoe.train.views import make_views
from tests.train.cases import read_rows


def events(folder) -> EventAccumulator:
    reader = EventAccumulator(str(folder), size_guidance={"scalars": 0, "histograms": 0, "images": 0})
    reader.Reload()
    return reader


def test_tensorboard_has_every_metric_of_every_row(undisturbed):
    run, _ = undisturbed
    reader = events(run / "tensorboard")
    rows = read_rows(run / "metrics.jsonl")
    tags = reader.Tags()
    assert set(tags["scalars"]) == {name for row in rows for name in row} - {"train/step"}
    for name in ("train/lm_loss", "eval/loss", "moe/layer_01/experts_per_token_mean"):
        expected = [(row["train/step"], pytest.approx(row[name], rel=1e-6)) for row in rows if name in row]
        assert [(event.step, event.value) for event in reader.Scalars(name)] == expected
    entries = read_rows(run / "histograms.jsonl")
    for event, entry in zip(reader.Histograms("moe/layer_00/experts_per_token"), entries, strict=True):
        assert event.step == entry["train/step"]
        counts = entry["layers"]["0"]["experts_per_token"]
        assert event.histogram_value.num == sum(counts)
        assert list(event.histogram_value.bucket)[: len(counts)] == counts
    assert [event.step for event in reader.Images("moe/load")] == [entry["train/step"] for entry in entries]


def test_tensorboard_hides_events_after_the_resumed_step(tmp_path):
    from dynmoe.train.tensorboard_view import TensorBoardView

    for first, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        view = TensorBoardView(tmp_path, first)
        for step in steps:
            view.log({"train/step": step, "train/lm_loss": float(10 * first + step)})
        view.close()
    assert [(event.step, event.value) for event in events(tmp_path).Scalars("train/lm_loss")] == [
        (1, 1.0), (2, 2.0), (3, 23.0), (4, 24.0),
    ]  # fmt: skip


def test_scores_of_an_earlier_step_hide_no_events(tmp_path):
    from dynmoe.train.tensorboard_view import TensorBoardView

    for first, step in ((0, 1), (1, 9), (None, 1)):
        view = TensorBoardView(tmp_path, first)
        view.log({"train/step": step, f"{first}": 1.0})
        view.close()
    assert [event.step for event in events(tmp_path).Scalars("1")] == [9]
    assert [event.step for event in events(tmp_path).Scalars("None")] == [1]


def test_a_view_that_cannot_be_created_is_left_out(tmp_path, corpus_dir, monkeypatch, capsys):
    """As where W&B's service cannot start, offline or online."""
    wandb = pytest.importorskip("wandb")

    def fail(*arguments, **named):
        raise SystemExit("no service")

    for name in ("setup", "init"):
        monkeypatch.setattr(wandb, name, fail)
    config = load_config(None, [
        f"run.dir={tmp_path}", "run.name=a", "logging.wandb=offline", "logging.tensorboard=true",
        f"data.dirs=[{corpus_dir}]",
    ])  # fmt: skip
    directory = RunDirectory(config.run.path)
    directory.path.mkdir()
    (directory.path / "tensorboard").write_text("a file")
    assert make_views(config, directory, lambda run: {}, "kept", 0) == ([], "kept")
    said = capsys.readouterr().out
    assert re.search(r"^TensorBoard failed \(.*\); it does not show this start of the run$", said, re.MULTILINE)
    assert re.search(r"^W&B failed \(.*\); it does not show this start of the run$", said, re.MULTILINE)


def row(step: int = 10, target: float | None = None, mean: float = 2.0, **of_layer_1: float) -> dict[str, float]:
    """A row of two layers without problems, except for the given values of layer 1."""
    healthy = {
        "experts_per_token_mean": 2.0, "experts_per_token_p5": 1, "experts_per_token_p50": 2,
        "experts_per_token_p95": 4, "selected_per_token_mean": 2.0, "active_experts": 8, "dead_experts": 0,
        "dropped_routes_frac": 0.05, "load_max_over_mean": 1.5,
    }  # fmt: skip
    made = {f"moe/layer_0{layer}/{name}": value for layer in (0, 1) for name, value in healthy.items()}
    made |= {f"moe/layer_01/{name}": value for name, value in of_layer_1.items()}
    made |= {"train/step": step, "train/lm_loss": 2.5, "train/tokens_per_s": 1000.0}
    made |= {"moe/experts_per_token_mean": 2.0, "moe/selected_per_token_mean": mean}
    return made | ({} if target is None else {"moe/experts_per_token_target": target})


CONFIG = load_config()
GLOBAL_BUDGET = dataclasses.replace(CONFIG, budget=BudgetConfig(scope="global"))


@pytest.mark.parametrize(
    ("bad", "kind", "beginning"),
    [
        (row(load_max_over_mean=7.4), ("collapse", 1), "layer 1 collapsed: one expert computes 92% of its rows"),
        (row(dead_experts=3), ("dead", 1), "layer 1: 3 of 8 experts received no token"),
        (row(dropped_routes_frac=0.2), ("drops", 1), "layer 1: 20% of the routes were dropped"),
        (
            row(target=2.0, selected_per_token_mean=2.5),
            ("budget", 1),
            "layer 1: 2.50 experts selected per token, but the budget",
        ),
        (
            row(target=2.0, selected_per_token_mean=1.5),
            ("budget", 1),
            "layer 1: 1.50 experts selected per token, but the budget",
        ),
    ],
)
def test_problem_is_reported_once_when_it_begins(bad, kind, beginning):
    assert find_problems(row(), CONFIG) == {}
    ((found, text),) = find_problems(bad, CONFIG).items()
    assert found == kind
    assert text.startswith(beginning)
    assert new_problems(row(), bad, CONFIG) == new_problems({}, bad, CONFIG) == [text]
    assert new_problems(bad, bad, CONFIG) == []


def test_global_budget_is_compared_with_the_mean_over_layers():
    apart = row(target=2.0, selected_per_token_mean=3.0)
    assert find_problems(apart, GLOBAL_BUDGET) == {}
    assert find_problems(row(target=2.0, mean=2.5), GLOBAL_BUDGET) == {
        ("budget", None): "2.50 experts selected per token, but the budget is 2.00"
    }


def test_values_within_the_limits_give_no_warning():
    fine = row(target=2.0, mean=2.3, load_max_over_mean=7.0, dropped_routes_frac=0.1)
    assert find_problems(fine, CONFIG) == {}
    alone = row(active_experts=1, load_max_over_mean=1.0)
    assert find_problems(alone, CONFIG) == {}, "a layer of one expert cannot collapse"
    limits = LoggingConfig(warn_expert_share=0.5, warn_dropped_frac=0.0, warn_budget_deviation=0.1)
    stricter = dataclasses.replace(GLOBAL_BUDGET, logging=limits)
    assert {kind for kind, _ in find_problems(fine, stricter)} == {"collapse", "drops", "budget"}
    assert find_problems({"train/step": 1, "train/lm_loss": 2.0}, CONFIG) == {}, "a dense model"


def test_console_shows_line_table_and_warning(capsys):
    console = RunConsole(steps=20, first_step=0)
    console.show(row(), 10)
    console.show_layers(row(dead_experts=3), 10)
    console.warn("layer 1: 3 of 8 experts received no token", 10)
    console.show_layers({"train/step": 10}, 10)
    console.close()
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0][:2] == ["step", "10/20"]
    assert "2.00 experts/token" in " ".join(lines[0])
    assert lines[1:4] == [
        ["step", "10"],
        ["layer", "experts/token", "p5", "p50", "p95", "in", "use", "dead", "dropped", "max/mean", "load"],
        ["0", "2.00", "1", "2", "4", "8", "0", "5.0%", "1.50"],
    ]
    assert lines[4] == ["1", "2.00", "1", "2", "4", "8", "3", "5.0%", "1.50"]
    assert " ".join(lines[5]) == "warning: step 10: layer 1: 3 of 8 experts received no token"
    assert len(lines) == 6


def test_logging_intervals_count_rows():
    logging = LoggingConfig(interval=5, histograms_every=3, table_every=0, trace_interval=4)
    assert [step for step in range(1, 40) if logging.draws_histograms(step)] == [15, 30]
    assert [step for step in range(1, 40) if logging.shows_table(step)] == []
    assert [step for step in range(1, 20) if logging.traces(step)] == [4, 8, 12, 16]
