"""The figures show the numbers of the files."""

from __future__ import annotations

import numpy as np
import pytest

from dynmoe.report import figures
from dynmoe.report.page import write_report
from dynmoe.report.pictures import pictures_of_run, sections, zero_throughout
from dynmoe.report.runs import Run, read_run


@pytest.fixture(scope="module")
def run(undisturbed) -> Run:
    return read_run(undisturbed[0])


def trace(figure, name: str):
    return next(own for own in figure.data if own.name == name)


def test_the_loss_can_be_drawn_against_four_axes(run):
    figure = figures.loss([run])
    assert list(trace(figure, "training").y) == [row["train/lm_loss"] for row in run.rows]
    evaluated = [row for row in run.rows if "eval/loss" in row]
    assert list(trace(figure, "validation").x) == [20, 40]
    assert list(trace(figure, "validation").y) == [row["eval/loss"] for row in evaluated]
    buttons = {button.label: button.args for button in figure.layout.updatemenus[0].buttons}
    axes = {"step": ("train/step", 1), "tokens (M)": ("train/tokens", 1e-6),
            "wall clock (min)": ("train/wall_clock_s", 1 / 60),
            "activated FLOPs (P)": ("train/cumulative_flops", 1e-15)}  # fmt: skip
    assert set(buttons) == {f"against {title}" for title in axes}
    for title, (metric, factor) in axes.items():
        data, layout = buttons[f"against {title}"]
        assert layout == {"xaxis.title.text": title}
        assert data["x"][0] == pytest.approx([row[metric] * factor for row in run.rows])
        assert data["x"][1] == pytest.approx([row[metric] * factor for row in evaluated])
    clock = [row["train/wall_clock_s"] for row in run.rows]
    assert clock == sorted(clock)


def test_experts_per_token_by_layer_with_mean_and_budget(run):
    figure = figures.experts_per_token([run])
    assert [own.name for own in figure.data] == ["mean over layers", "layer 0", "layer 1", "budget"]
    for name, metric in (("mean over layers", "moe/"), ("layer 1", "moe/layer_01/")):
        assert list(trace(figure, name).y) == [row[f"{metric}experts_per_token_mean"] for row in run.rows]
    assert set(trace(figure, "budget").y) == {1.5}


def test_several_runs_show_one_layer_at_a_time(run):
    figure = figures.by_layer([run, run], "router_entropy", "Entropy", "nats")
    buttons = {button.label: button.args[0]["visible"] for button in figure.layout.updatemenus[0].buttons}
    assert list(buttons) == ["mean over layers", "layer 0", "layer 1"]
    for label, visible in buttons.items():
        assert [own.name for own, on in zip(figure.data, visible, strict=True) if on] == [f"tiny, {label}"] * 2
    assert [bool(own.visible) for own in figure.data] == list(buttons["mean over layers"])
    with_budget = figures.experts_per_token([run, run])
    assert [own.name for own in with_budget.data][-2:] == ["tiny, budget"] * 2
    assert list(with_budget.layout.updatemenus[0].buttons[1].args[1]) == list(range(6)), "the budget stays in sight"


def test_the_heatmap_has_a_step_of_the_slider_for_each_entry(run):
    figure = figures.load(run)
    assert [step.label for step in figure.layout.sliders[0].steps] == [str(step) for step in range(4, 41, 4)]
    for frame, entry in zip(figure.frames, run.histograms, strict=True):
        assert frame.name == str(entry["train/step"])
        for row, own in zip(frame.data[0].z, entry["layers"].values(), strict=True):
            active = np.array(own["active"], dtype=bool)
            loads = np.array(own["load"], dtype=float)
            assert [value is None for value in row] == (~active).tolist()
            mean = loads[active].mean()
            assert [value for value in row if value is not None] == pytest.approx((loads[active] / mean).tolist())
    assert any(value is None for row in figure.frames[0].data[0].z for value in row), "inactive slots are gaps"
    assert figure.data[0].z == figure.frames[-1].data[0].z


def test_the_histogram_is_a_share_of_all_tokens(run):
    figure = figures.histogram(run)
    for frame, entry in zip(figure.frames, run.histograms, strict=True):
        for bars, own in zip(frame.data, entry["layers"].values(), strict=True):
            assert sum(bars.y) == pytest.approx(1.0)
            assert list(bars.y) == pytest.approx([count / 128 for count in own["experts_per_token"]])


def test_experts_that_came_and_went_are_where_and_when_they_did(run):
    figure = figures.adaptation(run)
    for change in ("added", "removed"):
        events = [event for event in run.events if event["change"] == change]
        own = trace(figure, change)
        assert list(zip(own.x, own.y, strict=True)) == [(event["step"], event["layer"]) for event in events]
        assert [data[0] for data in own.customdata] == [event["expert"] for event in events]


def test_long_runs_are_thinned_and_end_with_their_last_row(run):
    rows = [{"train/step": step, "train/lm_loss": 1.0} for step in range(1, 10_001)]
    figure = figures.loss([Run(run.path, "long", rows=rows)])
    assert len(figure.data[0].x) <= 2000
    assert figure.data[0].x[-1] == 10_000
    assert [button.label for button in figure.layout.updatemenus[0].buttons] == ["against step"]
    assert figures.load(Run(run.path, "nothing")) is None


def test_a_report_has_every_section_and_views_get_the_same_pictures(run):
    drawn = sections([run])
    assert list(drawn) == ["Loss", "Experts per token", "Load of the experts", "Experts added and removed", "Router",
                           "Speed and memory", "Optimizer"]  # fmt: skip
    assert set(drawn["Load of the experts"]) >= {"load_0", "load_max_over_mean", "ep_rank_load_max_over_mean",
                                                 "dead_experts", "dropped_routes_frac"}  # fmt: skip
    assert "mfu" not in drawn["Speed and memory"], "the peak of this device is unknown"
    assert set(pictures_of_run(run.path)) == {name for own in drawn.values() for name in own}
    dense = Run(run.path, "dense", rows=[{"train/step": 1, "train/lm_loss": 2.0, "train/tokens_per_s": 9.0}])
    assert list(sections([dense])) == ["Loss", "Speed and memory"]


QUIET = {"dead_experts": "active experts without tokens", "dropped_routes_frac": "dropped routes"}


def of_zeros(run: Run, **spikes: float) -> Run:
    """A run of many steps with one layer of experts; ``spikes`` happen in one step, which figures leave out."""
    rows = [
        {"train/step": step, "train/lm_loss": 2.0, "moe/router_entropy": 0.5, "moe/layer_00/router_entropy": 0.5,
         "moe/layer_00/active_experts": 4.0,
         **{f"moe/{layer}{name}": 0.0 for name in QUIET for layer in ("", "layer_00/")}}
        for step in range(1, 2002)
    ]  # fmt: skip
    rows[3] |= {f"moe/layer_00/{name}": value for name, value in spikes.items()}
    return Run(run.path, "zeros", rows=rows)


def page_of(runs: list[Run], path) -> str:
    write_report(runs, path)
    return path.read_text()


def test_what_is_zero_throughout_is_a_line_of_words(run, tmp_path):
    page = page_of([of_zeros(run)], tmp_path / "report.html")
    assert f"<p>Zero throughout: {'; '.join(QUIET.values())}.</p>" in page
    assert all(f'id="figure-{name}"' not in page for name in QUIET)
    assert 'id="figure-router_entropy"' in page
    both = page_of([of_zeros(run), of_zeros(run)], tmp_path / "both.html")
    assert f"<p>Zero throughout in every run: {'; '.join(QUIET.values())}.</p>" in both


def test_one_value_in_one_layer_of_one_run_brings_the_figure_back(run, tmp_path):
    spiked = of_zeros(run, dead_experts=1.0)
    assert 1.0 not in trace(figures.by_layer([spiked], "dead_experts", "", ""), "layer 0").y
    page = page_of([of_zeros(run), spiked], tmp_path / "report.html")
    assert 'id="figure-dead_experts"' in page
    assert 'id="figure-dropped_routes_frac"' not in page
    lost = of_zeros(run, dead_experts=float("nan"))
    for runs in ([spiked], [spiked, of_zeros(run)], [lost]):
        assert zero_throughout(runs).keys() == {"dropped_routes_frac"}
