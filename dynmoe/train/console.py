"""Console output of a run."""

from __future__ import annotations

import time

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from dynmoe.train.health import layers_of
from dynmoe.train.metrics import Row
from dynmoe.train.scores import figures_of, scores_of, shown_score

# Columns of the table of layers: heading, name of the metric, format.
_COLUMNS = (
    ("experts/token", "experts_per_token_mean", "{:.2f}"),
    ("p5", "experts_per_token_p5", "{:.0f}"),
    ("p50", "experts_per_token_p50", "{:.0f}"),
    ("p95", "experts_per_token_p95", "{:.0f}"),
    ("in use", "active_experts", "{:.0f}"),
    ("dead", "dead_experts", "{:.0f}"),
    ("dropped", "dropped_routes_frac", "{:.1%}"),
    ("max/mean load", "load_max_over_mean", "{:.2f}"),
)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def print_scores(row: Row, title: str, console: Console | None = None) -> None:
    """Prints a table of the tasks and domains of a row, if it has any."""
    found = scores_of(row)
    if not found:
        return
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for heading, side in (("scored on", "left"), ("figure", "left"), ("value", "left"), ("experts/token", "right")):
        table.add_column(heading, justify=side)  # type: ignore[arg-type]
    for name, scores in found.items():
        for figure in figures_of(scores):
            table.add_row(name, figure, *shown_score(scores, figure))
    (console or Console(soft_wrap=True, highlight=False)).print(table)


class RunConsole:
    """Prints a line that is updated on a terminal, or else one line per row; also tables and warnings."""

    def __init__(self, steps: int, first_step: int) -> None:
        self._steps = steps
        self._first = first_step
        self._console = Console(soft_wrap=True, highlight=False)
        self._live = Live(console=self._console, auto_refresh=False) if self._console.is_terminal else None
        self._start = time.perf_counter()
        if self._live is not None:
            self._live.start()

    def show(self, row: Row, step: int) -> None:
        per_step = (time.perf_counter() - self._start) / max(1, step - self._first)
        parts = [f"step {step}/{self._steps}"]
        parts += [f"loss {row['train/lm_loss']:.3f}"] if "train/lm_loss" in row else ["loss not finite"]
        parts += [f"validation {row['eval/loss']:.3f}"] if "eval/loss" in row else []
        parts += [f"{row['train/tokens_per_s']:.0f} tokens/s"]
        if "moe/experts_per_token_mean" in row:
            parts += [f"{row['moe/experts_per_token_mean']:.2f} experts/token"]
        parts += [f"{_duration(per_step * (self._steps - step))} left"]
        text = Text("  ".join(parts))
        if self._live is None:
            self._console.print(text)
        else:
            self._live.update(text, refresh=True)
        print_scores(row, f"step {step}", self._console)

    def show_layers(self, row: Row, step: int) -> None:
        """Prints a table of the MoE layers, if there are any."""
        layers = layers_of(row)
        if not layers:
            return
        table = Table(title=f"step {step}", title_justify="left", box=None, pad_edge=False)
        table.add_column("layer", justify="right")
        for heading, *_ in _COLUMNS:
            table.add_column(heading, justify="right")
        for layer in layers:
            cells = (form.format(row[f"moe/layer_{layer:02d}/{name}"]) for _, name, form in _COLUMNS)
            table.add_row(str(layer), *cells)
        self._console.print(table)

    def warn(self, text: str, step: int) -> None:
        self._console.print(Text(f"warning: step {step}: {text}", style="yellow"))

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
