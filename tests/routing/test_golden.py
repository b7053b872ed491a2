"""Routers against values computed by running public code of their papers (see tests/golden)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dynmoe.routing import losses, top_any, top_p
from dynmoe.routing.pooled import best_of_sequences, contested, odds_of_uniform
from dynmoe.routing.scope import TokenScope
from dynmoe.routing.selection import softmax_plan

GOLDEN = Path(__file__).parent.parent / "golden"
TOP_ANY = load_file(GOLDEN / "dynmoe_top_any.safetensors")
TOP_P = load_file(GOLDEN / "dynamic_moe_top_p.safetensors")
SEQ_TOP_K = load_file(GOLDEN / "seq_top_k.safetensors")
TOP_ANY_CASES = sorted({name.rsplit(".", 1)[0] for name in TOP_ANY if name.startswith("case")})


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", TOP_ANY_CASES)
def test_top_any(case):
    def golden(name):
        return TOP_ANY[f"{case}.{name}"].clone()

    training = case.endswith("train")
    x, prototypes, thresholds = (golden(name).requires_grad_() for name in ("x", "sim_matrix", "thresholds"))
    active = golden("experts_mask")
    plan = top_any(x, prototypes, thresholds, active, variant="released", training=training)
    assert torch.equal(plan.routing_map_TE.float(), golden("routing"))
    assert torch.equal(plan.experts_per_token_T.int(), golden("k"))
    assert torch.equal(plan.tokens_per_expert_E, golden("exp_counts"))
    close(plan.gates_TE, golden("combine_weights"))
    parameters = losses.diversity(prototypes, active) + losses.simplicity(prototypes)
    close(parameters.view(1), golden("diversity_simplicity"))
    loss = parameters + losses.gate_balance(plan) + losses.efficiency(plan)
    close(loss.view(1), golden("l_aux"))
    if training:
        ((plan.gates_TE * golden("upstream")).sum() + 0.01 * loss).backward()
        for name, tensor in (("grad_x", x), ("grad_sim", prototypes), ("grad_thr", thresholds)):
            close(tensor.grad, golden(name))


@pytest.mark.parametrize("route", sorted({name.split(".")[0] for name in TOP_P}))
def test_top_p(route):
    plan = top_p(TOP_P[f"{route}.logits"], TOP_P[f"{route}.p"].item(), variant="released")
    assert torch.equal(plan.experts_per_token_T, TOP_P[f"{route}.k"])
    assert torch.equal(plan.routing_map_TE, TOP_P[f"{route}.weights"] > 0)
    close(plan.gates_TE, TOP_P[f"{route}.weights"])


@pytest.mark.parametrize("case", sorted({name.split(".")[0] for name in SEQ_TOP_K}))
def test_seq_top_k(case):
    logits, upstream, weights, routing, gradient, sequences, k, most = (
        SEQ_TOP_K[f"{case}.{name}"].clone()
        for name in ("logits", "upstream", "weights", "routing", "grad", "sequences", "k", "most")
    )
    logits.requires_grad_()
    probs = logits.softmax(dim=1)
    values = contested(odds_of_uniform(probs), 0, int(most))
    plan = softmax_plan(logits, probs, best_of_sequences(values, float(k), TokenScope(int(sequences))), False)
    assert torch.equal(plan.routing_map_TE, routing)
    close(plan.gates_TE, weights)
    (plan.gates_TE * upstream).sum().backward()
    close(logits.grad, gradient)
    assert len(plan.experts_per_token_T.unique()) > 1 or k == most
