#!/usr/bin/env bash
# Compiled for a CPU, a router that ranks experts by sort and scatter selects every expert of every token.
#
# Expected: torch.compile gives the same selection as eager execution: with ranks from a stable sort (an arange that is
# scattered to the sorted places), "rank < 2" selects two of eight experts.
# Observed: with a softmax before it, and with the selection used twice (returned, and to mask the probabilities), the
# compiled function returns a mask that is True everywhere, without a warning. The masked probabilities are wrong too.
# Ranks by a second argsort are right.
#
# Seen with torch 2.13.0 (CPU, dynamic shapes, 7 tokens; number of selected experts: eager, compiled):
#   8 experts, scatter: 14, 56
#   8 experts, argsort: 14, 14
#   4 experts, scatter: 14, 28
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
"${PYTHON:-python3}" -m venv venv
venv/bin/python -m pip install -qq torch==2.13.0 numpy

venv/bin/python -I - <<'END'
import torch


def by_scatter(scores):
    order = scores.argsort(dim=1, descending=True, stable=True)
    return torch.zeros_like(order).scatter(1, order, torch.arange(scores.shape[1]).expand_as(order))


def by_argsort(scores):
    return scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)


def selected(rank, experts):
    def choose(logits):
        probs = logits.softmax(dim=1)
        chosen = rank(probs / (probs + 1.0)) < 2
        return chosen, probs.masked_fill(~chosen, 0.0)

    torch._dynamo.reset()
    logits = torch.randn(7, experts, generator=torch.Generator().manual_seed(0))
    return [int(run(logits)[0].sum()) for run in (choose, torch.compile(choose, dynamic=True))]


seen = {}
for experts, rank in ((8, by_scatter), (8, by_argsort), (4, by_scatter)):
    name = f"{experts} experts, {rank.__name__.removeprefix('by_')}"
    seen[name] = selected(rank, experts)
    print(f"{name}: {seen[name][0]}, {seen[name][1]}")
assert seen == {
    "8 experts, scatter": [14, 56], "8 experts, argsort": [14, 14], "4 experts, scatter": [14, 28],
}, seen
END
