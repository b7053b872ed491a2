"""Warnings about a row of metrics: collapsed layers, dead experts, dropped routes, missed budgets."""

from __future__ import annotations

import re

from dynmoe.config import Config
from dynmoe.train.metrics import Row

_LAYER = re.compile(r"moe/layer_([0-9]+)/active_experts")


def layers_of(row: Row) -> list[int]:
    """The MoE layers in a row of metrics."""
    return sorted(int(match.group(1)) for name in row if (match := _LAYER.fullmatch(name)))


def find_problems(row: Row, config: Config) -> dict[tuple[str, int | None], str]:
    """Descriptions of the problems in a row, by kind and layer (None: the mean over layers).

    Kinds: ``collapse`` (one expert computes nearly all rows of a layer), ``dead`` (active experts without a token in
    the step), ``drops``, and ``budget`` (experts selected per token, before drops, of each layer or of the mean over
    layers, whichever the budget controls).
    """
    limits = config.logging
    found: dict[tuple[str, int | None], str] = {}
    for layer in layers_of(row):
        names = ("active_experts", "dead_experts", "dropped_routes_frac", "load_max_over_mean")
        active, dead, dropped, max_over_mean = (row[f"moe/layer_{layer:02d}/{name}"] for name in names)
        share = max_over_mean / active
        if active > 1 and share > limits.warn_expert_share:
            found["collapse", layer] = f"layer {layer} collapsed: one expert computes {share:.0%} of its rows"
        elif dead:
            found["dead", layer] = f"layer {layer}: {dead:.0f} of {active:.0f} experts received no token"
        if dropped > limits.warn_dropped_frac:
            found["drops", layer] = f"layer {layer}: {dropped:.0%} of the routes were dropped"
    target = row.get("moe/experts_per_token_target")
    if target is not None:
        held = [None] if config.budget.scope == "global" else layers_of(row)
        for own in held:
            where, name = ("", "moe") if own is None else (f"layer {own}: ", f"moe/layer_{own:02d}")
            mean = row[f"{name}/selected_per_token_mean"]
            if abs(mean / target - 1) > limits.warn_budget_deviation:
                found["budget", own] = f"{where}{mean:.2f} experts selected per token, but the budget is {target:.2f}"
    return found


def new_problems(before: Row, row: Row, config: Config) -> list[str]:
    """Descriptions of the problems in ``row`` that the previous row did not have."""
    known = find_problems(before, config)
    return [text for kind, text in find_problems(row, config).items() if kind not in known]
