"""The report's figures: pure functions from runs to plotly figures. A figure without data is None."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.colors
import plotly.graph_objects as go

from dynmoe.report.runs import Run
from dynmoe.train.metrics import Histograms
from dynmoe.train.scores import EXPERTS, figures_of

_MAX_POINTS = 2000
_MAX_FRAMES = 60
_PALETTE = plotly.colors.qualitative.D3
# Colours from the first to the last layer, visible on light and dark pages.
_DEPTH = plotly.colors.make_colorscale(["#3b82f6", "#14b8a6", "#84cc16", "#f59e0b"])
# x axes of the loss: title, metric, factor.
_AXES = (
    ("step", "train/step", 1.0),
    ("tokens (M)", "train/tokens", 1e-6),
    ("wall clock (min)", "train/wall_clock_s", 1 / 60),
    ("activated FLOPs (P)", "train/cumulative_flops", 1e-15),
)


def _figure(title: str, y_title: str, x_title: str = "step", **layout: Any) -> go.Figure:
    """Creates an empty figure in the report's style; the page sets the colours of text and grid."""
    figure = go.Figure()
    figure.update_layout(
        title={"text": title, "x": 0, "xanchor": "left", "y": 0.97, "yanchor": "top", "font": {"size": 15}},
        height=400, margin={"l": 56, "r": 12, "t": 64}, paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)",
        hovermode="closest", legend={"orientation": "h", "y": -0.28, "yanchor": "top"},
        xaxis={"title": {"text": x_title, "standoff": 8}}, yaxis={"title": y_title, "automargin": True}, **layout,
    )  # fmt: skip
    return figure


def _thinned(values: list[Any], most: int = _MAX_POINTS) -> list[Any]:
    """Selects about ``most`` values, evenly spaced, including the last one."""
    stride = -(-len(values) // most)
    return values[::-1][::stride][::-1] if stride > 1 else values


def _colour(number: int) -> str:
    """Colour of a run by its index among the compared runs."""
    return _PALETTE[number % len(_PALETTE)]


def _shades(layers: int) -> list[str]:
    """Colours of the layers."""
    return plotly.colors.sample_colorscale(_DEPTH, [place / max(1, layers - 1) for place in range(layers)])


def _line(x: list[Any], y: list[Any], name: str, colour: str, **settings: Any) -> go.Scatter:
    x = _thinned(x)
    y = _thinned(y)
    hover = f"<b>{name}</b><br>%{{x:.6~g}}: %{{y:.4~g}}<extra></extra>"
    mode = "lines" if len(x) > 1 else "markers"  # a run with one row is a point
    return go.Scatter(x=x, y=y, name=name, mode=mode, line_color=colour, hovertemplate=hover, **settings)


def _menu(buttons: list[dict[str, Any]]) -> list[dict[str, Any]]:
    place = {"x": 1, "xanchor": "right", "y": 1.2, "yanchor": "top"}
    return [{"type": "dropdown", "buttons": buttons, "showactive": True, **place}]


def loss(runs: Sequence[Run]) -> go.Figure | None:
    """Training and validation loss against steps, tokens, wall clock or activated FLOPs, selected in the figure."""
    figure = _figure("Loss", "nats per token")
    rows_of_trace: list[list[dict[str, float]]] = []
    for number, run in enumerate(runs):
        colour = _colour(number)
        for metric, what in (("train/lm_loss", "training"), ("eval/loss", "validation")):
            rows = _thinned([row for row in run.rows if metric in row])
            if not rows:
                continue
            weighted = what == "validation" and "eval/loss_by_tokens" in rows[-1]
            what_kind = f"{what}, weighted as in training" if weighted else what
            name = f"{run.name}, {what_kind}" if len(runs) > 1 else what_kind
            x = [row["train/step"] for row in rows]
            y = [row[metric] for row in rows]
            trace = _line(x, y, name, colour)
            if what == "validation":
                trace.update(mode="lines+markers", line={"dash": "dot"}, marker={"size": 8})
            figure.add_trace(trace)
            rows_of_trace.append(rows)
    buttons = []
    for title, metric, factor in _AXES:
        if all(metric in row for rows in rows_of_trace for row in rows):
            xs = [[row[metric] * factor for row in rows] for rows in rows_of_trace]
            label = f"against {title}"
            buttons.append({"label": label, "method": "update", "args": [{"x": xs}, {"xaxis.title.text": title}]})
    figure.update_layout(updatemenus=_menu(buttons))
    return figure if rows_of_trace else None


def by_layer(runs: Sequence[Run], figure_name: str, title: str, y_title: str) -> go.Figure | None:
    """A metric of the MoE layers over training.

    One run: a line for each layer and their mean. Several: a line for each run, of the mean or of the layer selected in
    the figure.
    """
    figure = _figure(title, y_title)
    layers = sorted({layer for run in runs for layer in run.layers})
    if not layers:
        return None
    several = len(runs) > 1
    shades = _shades(len(layers))
    groups: list[tuple[str, str, int | None]] = [("mean over layers", f"moe/{figure_name}", None)]
    groups += [(f"layer {layer}", f"moe/layer_{layer:02d}/{figure_name}", i) for i, layer in enumerate(layers)]
    shown_in: list[int] = []
    for number, run in enumerate(runs):
        for place, (label, metric, shade) in enumerate(groups):
            steps, values = run.series(metric)
            if not steps:
                continue
            if several:
                colour = _colour(number)
                settings = dict[str, Any](visible=place == 0)
            else:
                colour = _PALETTE[3] if shade is None else shades[shade]
                settings = {"line_width": 3} if shade is None else {}
            figure.add_trace(_line(steps, values, f"{run.name}, {label}" if several else label, colour, **settings))
            shown_in.append(place)
    if several:
        # Only the traces of this function, so that traces added later stay visible.
        which = list(range(len(shown_in)))
        buttons = [
            {"label": label, "method": "restyle", "args": [{"visible": [own == place for own in shown_in]}, which]}
            for place, (label, *_) in enumerate(groups)
        ]
        figure.update_layout(updatemenus=_menu(buttons))
    return figure if shown_in else None


def experts_per_token(runs: Sequence[Run]) -> go.Figure | None:
    """Experts per token by layer, with the budget if there is one."""
    figure = by_layer(runs, "experts_per_token_mean", "Experts per token", "experts per token")
    for number, run in enumerate(runs):
        steps, targets = run.series("moe/experts_per_token_target")
        if figure is not None and steps and len(runs) == 1:
            figure.add_trace(_line(steps, targets, "budget", "#888", line_dash="dash"))
        elif figure is not None and steps:
            figure.add_trace(_line(steps, targets, f"{run.name}, budget", _colour(number), opacity=0.5))
    return figure


def over_time(runs: Sequence[Run], metric: str, title: str, y_title: str) -> go.Figure | None:
    """One metric of each run over training."""
    figure = _figure(title, y_title)
    for number, run in enumerate(runs):
        steps, values = run.series(metric)
        if steps:
            figure.add_trace(_line(steps, values, run.name, _colour(number), showlegend=len(runs) > 1))
    return figure if figure.data else None


def experts_by_task(runs: Sequence[Run]) -> go.Figure | None:
    """Latest experts per token of every task and domain."""
    figure = _figure("Experts per token by task", "experts per token", "")
    for number, run in enumerate(runs):
        experts = {name: scores[EXPERTS] for name, scores in run.scores.items() if EXPERTS in scores}
        if experts:
            figure.add_trace(go.Bar(
                x=list(experts), y=list(experts.values()), name=run.name, marker_color=_colour(number),
                showlegend=len(runs) > 1, hovertemplate=f"<b>{run.name}</b><br>%{{x}}: %{{y:.3f}}<extra></extra>",
            ))  # fmt: skip
    figure.update_xaxes(tickangle=-30, automargin=True)
    return figure if figure.data else None


def scores(runs: Sequence[Run]) -> go.Figure | None:
    """Scores over training of the selected task and metric; None if each was scored only once."""
    figure = _figure("Scores", "score")
    chosen = {
        f"{name} {own}": f"eval/{name}/{own}"
        for run in runs for name, scores in run.scores.items() for own in figures_of(scores)
    }  # fmt: skip
    shown_in: list[str] = []
    for label, metric in chosen.items():
        for number, run in enumerate(runs):
            steps, values = run.series(metric)
            if steps:
                colour = _colour(number)
                visible = label == next(iter(chosen))
                figure.add_trace(_line(steps, values, run.name, colour, visible=visible, showlegend=len(runs) > 1))
                figure.data[-1].update(mode="lines+markers")
                shown_in.append(label)
    figure.update_layout(updatemenus=_menu([
        {"label": label, "method": "restyle", "args": [{"visible": [own == label for own in shown_in]}]}
        for label in chosen
    ]))  # fmt: skip
    return figure if any(len(trace.x) > 1 for trace in figure.data) else None


def load(run: Run) -> go.Figure | None:
    """Heatmap of the load by layer and expert, relative to the layer's mean, with a slider over training."""
    entries = _thinned([entry for entry in run.histograms if entry["layers"]], _MAX_FRAMES)
    if not entries:
        return None
    highest = max(value for entry in entries for row in _relative_load(entry) for value in row if value is not None)
    frames = []
    for entry in entries:
        heatmap = go.Heatmap(
            z=_relative_load(entry), y=[f"layer {layer}" for layer in entry["layers"]], zmin=0, zmax=max(highest, 1.0),
            colorscale="Viridis", colorbar={"title": "× mean", "thickness": 12}, xgap=1, ygap=1, hoverongaps=True,
            hovertemplate="%{y}, expert %{x}<br>%{z:.2f} × the mean load<extra></extra>",
        )  # fmt: skip
        frames.append((int(entry["train/step"]), [heatmap]))
    figure = _figure(f"Load of each expert: {run.name}", "", "expert (gaps: inactive)")
    figure.update_yaxes(autorange="reversed", title=None)
    return _animate(figure, frames)


def _relative_load(entry: Histograms) -> list[list[float | None]]:
    rows = []
    for own in entry["layers"].values():
        used = [tokens for tokens, active in zip(own["load"], own["active"], strict=True) if active]
        mean = sum(used) / max(1, len(used))
        rows.append([
            (tokens / mean if mean else 0.0) if active else None
            for tokens, active in zip(own["load"], own["active"], strict=True)
        ])  # fmt: skip
    return rows


def histogram(run: Run) -> go.Figure | None:
    """Share of tokens by number of experts, one colour per layer, with a slider over training."""
    entries = _thinned([entry for entry in run.histograms if entry["layers"]], _MAX_FRAMES)
    if not entries:
        return None
    layers = list(entries[-1]["layers"])
    shades = _shades(len(layers))
    frames = []
    highest = 0.0
    widest = 0
    for entry in entries:
        bars = []
        for colour, (layer, own) in zip(shades, entry["layers"].items(), strict=False):
            counts = own["experts_per_token"]
            share = [count / max(1, sum(counts)) for count in counts]
            highest = max(highest, *share)
            widest = max([widest, *(number for number, count in enumerate(counts) if count)])
            name = f"layer {layer}"
            hover = f"{name}<br>%{{x}} experts: %{{y:.1%}} of the tokens<extra></extra>"
            bars.append(
                go.Bar(x=list(range(len(counts))), y=share, name=name, marker_color=colour, hovertemplate=hover)
            )
        frames.append((int(entry["train/step"]), bars))
    figure = _figure(f"Tokens by number of experts: {run.name}", "share of tokens", "experts per token")
    figure.update_xaxes(range=[-0.6, widest + 0.6], dtick=1 if widest <= 20 else None)
    figure.update_yaxes(range=[0, highest * 1.05], tickformat=".0%")
    return _animate(figure, frames)


def _animate(figure: go.Figure, frames: list[tuple[int, list[Any]]]) -> go.Figure:
    """Adds a slider over the traces of each step, which initially shows the last step."""
    figure.add_traces(frames[-1][1])
    figure.frames = [go.Frame(name=str(step), data=traces) for step, traces in frames]
    now = {"mode": "immediate", "frame": {"duration": 0, "redraw": True}, "transition": {"duration": 0}}
    steps = [{"label": str(step), "method": "animate", "args": [[str(step)], now]} for step, _ in frames]
    slider = {"active": len(frames) - 1, "currentvalue": {"prefix": "step "}, "pad": {"t": 52}, "steps": steps}
    legend = {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"}  # the slider takes the usual place
    figure.update_layout(sliders=[slider], height=480, margin_t=96, legend=legend)
    return figure


def adaptation(run: Run) -> go.Figure | None:
    """Experts added and removed: which, where, when and why."""
    if not run.events:
        return None
    figure = _figure(f"Experts added and removed: {run.name}", "layer")
    for change, symbol, colour in (("added", "triangle-up", _PALETTE[2]), ("removed", "x", _PALETTE[3])):
        own = [event for event in run.events if event["change"] == change]
        figure.add_trace(go.Scatter(
            x=[event["step"] for event in own], y=[event["layer"] for event in own], name=change, mode="markers",
            marker={"symbol": symbol, "size": 10, "color": colour, "opacity": 0.7},
            customdata=[[event["expert"], event.get("rank", "?"), event.get("reason", "")] for event in own],
            hovertemplate=f"step %{{x}}, layer %{{y}}<br>expert %{{customdata[0]}} {change} on rank %{{customdata[1]}}"
            "<br>%{customdata[2]}<extra></extra>",
        ))  # fmt: skip
    layers = [*run.layers, *(event["layer"] for event in run.events)]
    figure.update_yaxes(dtick=1, range=[min(layers) - 0.5, max(layers) + 0.5])
    return figure


def budget_curve(name: str, curves: dict[str, list[tuple[float, float]]]) -> go.Figure:
    """Score ``name`` against experts per token: for each run, by name, its pairs of experts per token and score."""
    figure = _figure(name, "score", "experts per token")
    for number, (run, points) in enumerate(curves.items()):
        experts, values = zip(*points, strict=True)
        figure.add_trace(_line(list(experts), list(values), run, _colour(number)))
        figure.data[-1].update(mode="lines+markers", marker={"size": 9})
    return figure
