"""What a row of the metrics should make one look up for: layers that collapse, experts that die, drops, budgets."""

from __future__ import annotations

import re

from dynmoe.config import Config
from dynmoe.train.metrics import Row

_LAYER = re.compile(r"moe/layer_([0-9]+)/active_experts")


def layers_of(row: Row) -> list[int]:
    """MoE layers that a row has figures of."""
    return sorted(int(match.group(1)) for name in row if (match := _LAYER.fullmatch(name)))


def troubles(row: Row, config: Config) -> dict[tuple[str, int | None], str]:
    """What is wrong in a row, each in a sentence, by kind and layer (None: the mean over layers).

    Kinds: ``collapse`` (one expert computes nearly all rows of a layer), ``dead`` (experts in use that computed no
    token of the step), ``drops`` and ``budget`` (of each layer, or of their mean where that is held; before drops, as
    the budget is).
    """
    limits, found = config.logging, dict[tuple[str, int | None], str]()
    for layer in layers_of(row):
        figures = {
            name: row[f"moe/layer_{layer:02d}/{name}"]
            for name in ("active_experts", "dead_experts", "dropped_routes_frac", "load_max_over_mean")
        }
        active, dead, dropped = (figures[name] for name in ("active_experts", "dead_experts", "dropped_routes_frac"))
        share = figures["load_max_over_mean"] / active
        if active > 1 and share > limits.warn_expert_share:
            found["collapse", layer] = f"layer {layer} collapses: one expert computes {share:.0%} of its rows"
        elif dead:
            found["dead", layer] = f"layer {layer}: {dead:.0f} of {active:.0f} experts computed no token"
        if dropped > limits.warn_dropped_frac:
            found["drops", layer] = f"layer {layer}: {dropped:.0%} of the routes were dropped"
    target = row.get("moe/experts_per_token_target")
    if target is not None:
        held = [None] if config.budget.scope == "global" else layers_of(row)
        for own in held:
            where, name = ("", "moe") if own is None else (f"layer {own}: ", f"moe/layer_{own:02d}")
            mean = row[f"{name}/selected_per_token_mean"]
            if abs(mean / target - 1) > limits.warn_budget_deviation:
                found["budget", own] = f"{where}{mean:.2f} experts selected per token where the budget is {target:.2f}"
    return found


def new_troubles(before: Row, row: Row, config: Config) -> list[str]:
    """Sentences on what is wrong in ``row`` and was not in the row before it: each trouble is told when it begins."""
    known = troubles(before, config)
    return [text for kind, text in troubles(row, config).items() if kind not in known]
