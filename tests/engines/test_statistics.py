"""Compares every metric of every layer with a token-by-token count over the routing of the step."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tests.engines.cases import GLOBAL_BATCH, LENGTH, config_for
from tests.engines.routing_cases import train_and_keep
from tests.oracles import entropy

STEPS = 3
MEGATRON = "engine=megatron"
ROUTERS = {
    # Capacity drops, a mean-experts limit, a budget on its schedule, and every loss of a softmax router.
    "top_p": ["model.router.kind=top_p", "model.router.p=0.6", "model.router.max_experts=3",
              "model.moe.capacity_factor=1.0", "model.router.z_loss=1e-3", "budget.method=pi",
              "budget.experts_per_token=1.5", "budget.start=2.5", "budget.over_steps=10"],
    # Tokens without experts, and inactive slots.
    "top_any": ["model.router.kind=top_any", "model.router.min_experts=0", "model.moe.active_at_start=3",
                "model.router.temperature=sqrt_hidden", "model.router.balance_loss=1e-2"],
}  # fmt: skip
LAYOUTS = {
    "DeepSpeed DP 2": ["train.micro_batch=4"],
    "DeepSpeed EP 2": ["train.micro_batch=4", "parallel.expert=2"],
    "DeepSpeed accumulation 2": ["train.micro_batch=2"],
    "DeepSpeed accumulation 2, recomputed": ["train.micro_batch=2", "train.recompute=full"],
    "Megatron PP 2": [MEGATRON, "train.micro_batch=4", "parallel.pipeline=2"],
    "Megatron PP 2, recomputed": [MEGATRON, "train.micro_batch=2", "parallel.pipeline=2", "train.recompute=full"],
    "Megatron EP 2, accumulation 2": [MEGATRON, "train.micro_batch=2", "parallel.expert=2"],
    "Megatron TP 2": [MEGATRON, "train.micro_batch=4", "parallel.tensor=2", "model.kv_heads=2"],
    "DeepSpeed EP 2, recomputed": ["train.micro_batch=2", "parallel.expert=2", "train.recompute=selective"],
    "Megatron PP 2 interleaved": [MEGATRON, "train.micro_batch=2", "model.layers=4", "parallel.pipeline=2",
                                  "parallel.virtual_pipeline=2"],
}  # fmt: skip
SLOW = ("DeepSpeed EP 2, recomputed", "Megatron PP 2 interleaved")


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def passes_of(layer: int, results: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The plans of a layer, by micro-batch, of every rank that holds it."""
    numbers = sorted({number for result in results for own, number in result["plans"] if own == layer})
    held = [result["plans"] for result in results if (layer, numbers[0]) in result["plans"]]
    return [[plans[layer, number] for plans in held] for number in numbers]


def rows_of(plans: list[dict[str, Any]], name: str) -> list[list[Any]]:
    """One entry per token, over several plans."""
    return [row for plan in plans for row in plan[name]]


def counted(layer: int, results: list[dict[str, Any]], config: Any, ranks_of_experts: int) -> dict[str, float]:
    """Metrics of a layer that are counts over tokens."""
    plans = [plan for ranks in passes_of(layer, results) for plan in ranks]
    routed, selected, scores = (rows_of(plans, name) for name in ("routed", "selected", "scores"))
    tokens = len(routed)
    experts = len(routed[0])
    used = [sum(row) for row in routed]
    chosen = [sum(row) for row in selected]
    load = [sum(row[expert] for row in routed) for expert in range(experts)]
    active = [expert for expert in range(experts) if plans[0]["active"][expert]]
    loads = [load[expert] for expert in active]
    share = [[value / max(sum(row), 1e-30) for value in row] for row in scores]
    best = [sorted(row, reverse=True) for row in scores]
    size = experts // ranks_of_experts
    rank_load = [sum(load[rank * size : (rank + 1) * size]) for rank in range(ranks_of_experts)]
    ceiling = min(config.model.router.max_experts or experts, len(active))
    figures = {
        "experts_per_token_mean": mean(used),
        "experts_per_token_max": max(used),
        "selected_per_token_mean": mean(chosen),
        "tokens_without_expert_frac": mean([count == 0 for count in chosen]),
        "tokens_at_ceiling_frac": mean([count >= ceiling for count in used]),
        "active_experts": len(active),
        "dead_experts": sum(count == 0 for count in loads),
        "load_max_over_mean": max(loads) / mean(loads),
        "load_cv": math.sqrt(mean([(count - mean(loads)) ** 2 for count in loads])) / mean(loads),
        "router_entropy": mean([entropy(row) for row in share]),
        "top1_margin": mean([row[0] - row[1] for row in best]),
        "dropped_routes_frac": (sum(chosen) - sum(used)) / sum(chosen),
        "tokens_all_dropped_frac": mean([c > 0 and u == 0 for c, u in zip(chosen, used, strict=True)]),
        "ep_rank_load_max_over_mean": max(rank_load) / mean(rank_load),
    }
    for percent in (5, 50, 95):
        # The smallest K that at least this percentage of tokens does not exceed.
        exact = next(k for k in range(experts + 1) if sum(count <= k for count in used) * 100 >= percent * tokens)
        figures[f"experts_per_token_p{percent}"] = exact
    return figures


def counts_of(layer: int, results: list[dict[str, Any]]) -> dict[str, list[int]]:
    """The histograms of a layer."""
    plans = [plan for ranks in passes_of(layer, results) for plan in ranks]
    routed = rows_of(plans, "routed")
    assert len(routed) == GLOBAL_BATCH * LENGTH
    used = [sum(row) for row in routed]
    experts = range(len(routed[0]))
    return {
        "experts_per_token": [used.count(number) for number in range(len(experts) + 1)],
        "load": [sum(row[expert] for row in routed) for expert in experts],
        "active": [int(on) for on in plans[0]["active"]],
    }


def losses(layer: int, results: list[dict[str, Any]], config: Any) -> dict[str, float]:
    """Auxiliary losses of a layer, averaged over passes; the balance loss counts over the step's passes so far."""
    router = config.model.router
    figures: dict[str, list[float]] = {name: [] for name in router.losses}
    passes = passes_of(layer, results)
    for number, ranks in enumerate(passes):
        so_far = [plan for earlier in passes[: number + 1] for plan in earlier]
        selected = rows_of(so_far, "selected")
        experts = len(selected[0])
        takers = [row for row in selected if any(row)]
        active = [expert for expert in range(experts) if ranks[0]["active"][expert]]
        if router.kind == "top_p":
            scores = rows_of(ranks, "scores")
            fraction = [mean([row[e] for row in selected]) for e in range(experts)]
            score = [mean([row[e] for row in scores]) for e in range(experts)]
            figures["balance"].append(experts * sum(f * q for f, q in zip(fraction, score, strict=True)))
            figures["entropy"].append(mean([entropy(row) for row in scores]))
            logits = rows_of(ranks, "logits")
            figures["z"].append(mean([math.log(sum(map(math.exp, row))) ** 2 for row in logits]))
            continue
        # Uniform gates: 1 / K for a token with K experts.
        gates = [[on / max(1, sum(row)) for on in row] for row in rows_of(ranks, "selected")]
        takers_of_rank = len(takers) / (number + 1)  # over all ranks, averaged over the passes so far
        gate = [sum(row[e] for row in gates) / takers_of_rank for e in range(experts)]
        fraction = [sum(row[e] for row in takers) / len(takers) for e in range(experts)]
        figures["balance"].append(len(active) * sum(g * f for g, f in zip(gate, fraction, strict=True)))
        columns = [[row[e] for row in ranks[0]["prototypes"]] for e in active]
        norms = [math.sqrt(sum(value**2 for value in column)) for column in columns]
        figures["simplicity"].append(mean(norms))
        squares = [
            (sum(a * b for a, b in zip(columns[i], columns[j], strict=True)) / norms[i] / norms[j] - (i == j)) ** 2
            for i in range(len(active))
            for j in range(len(active))
        ]
        figures["diversity"].append(math.sqrt(sum(squares)))
    means = {name: mean(values) for name, values in figures.items()}
    total = sum(router.loss_coefficients()[name] * value for name, value in means.items())
    return {"auxiliary_loss": total, **{f"{name}_loss": value for name, value in means.items()}}


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in LAYOUTS]
)
@pytest.mark.parametrize("kind", ROUTERS)
def test_every_metric_equals_a_count_over_the_routing_of_the_step(two_ranks, layout, kind):
    overrides = [*ROUTERS[kind], *LAYOUTS[layout]]
    config = config_for(*overrides)
    results = two_ranks.run(train_and_keep, overrides, STEPS)
    row = results[0]["row"]
    assert all(result["row"] == row for result in results)
    layers = config.model.moe_layers
    expected: dict[str, float] = {}
    for layer in layers:
        own = counted(layer, results, config, config.parallel.expert) | losses(layer, results, config)
        expected |= {f"moe/layer_{layer:02d}/{name}": value for name, value in own.items()}
    for name in own:
        expected[f"moe/{name}"] = mean([expected[f"moe/layer_{layer:02d}/{name}"] for layer in layers])
    control = {"top_p": "router_p", "top_any": "router_threshold_mean"}[kind]
    if kind == "top_p":
        # From 2.5 to 1.5 over ten steps; this is the third.
        expected["moe/experts_per_token_target"] = 2.3
        assert row["moe/layer_00/dropped_routes_frac"] > 0
        assert row["moe/layer_00/tokens_at_ceiling_frac"] > 0
    else:
        assert row["moe/layer_00/tokens_without_expert_frac"] > 0
        assert row["moe/layer_00/active_experts"] == 3
        assert row["moe/layer_00/tokens_at_ceiling_frac"] > 0
    # No other metrics are reported, except the state of the router.
    assert {name for name in row if not name.endswith(control)} == set(expected)
    for name, value in expected.items():
        assert row[name] == pytest.approx(value, rel=1e-5, abs=1e-7), name
    assert results[0]["histograms"] == {
        "train/step": STEPS, "layers": {str(layer): counts_of(layer, results) for layer in layers},
    }  # fmt: skip
