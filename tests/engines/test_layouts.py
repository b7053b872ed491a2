"""Both engines in every layout train like the plain model from the same weights and data."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch

from tests.engines.cases import config_for, to_canonical, train, train_plainly
from tests.engines.comparisons import largest_difference, maps_of_all_ranks, read_canonical
from tests.moe.cases import ATTENTIVE, BASELINES, LATENT, LONGCAT, ROUTERS

STEPS = 20
# All losses of a router together. Every forward pass, over all ranks, has the same two sequences.
COMMON = ["model.layers=4", "model.kv_heads=2", "optimizer.clip_grad=1.0"]
LOSSES = {
    "top_k": ["model.router.z_loss=1e-3", "model.router.entropy_loss=1e-3"],
    "top_p": ["model.router.z_loss=1e-3"],
    "top_any": ["model.router.balance_loss=1e-2"],
}
LONG = [
    "model.rope_scaling.kind=yarn", "model.rope_scaling.factor=4", "model.rope_scaling.original_length=8",
    "model.window=7", "model.full_attention_layers=[1,3]",
]  # fmt: skip
# By name in the table.
MODELS = {kind: [*ROUTERS[kind], *losses] for kind, losses in LOSSES.items()} | {
    # The plain loop has no budget.
    **{
        kind: [*(part for part in BASELINES[kind] if not part.startswith("budget")), "optimizer.clip_grad=0.5"]
        for kind in ("identity_experts", "dtop_p")
    },
    "top_p, heads normalized": [*ROUTERS["top_p"], "model.qk_norm=head", "model.head_dim=24"],
    "top_p, projections normalized": [*ROUTERS["top_p"], "model.qk_norm=projection"],
    # Routers that select among the tokens of a sequence or of the batch.
    **{kind: BASELINES[kind] for kind in ("seq_top_k", "expert_race", "resonance")},
    "da_moe": ATTENTIVE["da_moe"],
    # A first dense layer, so that the first of four stages of a pipeline has no experts.
    "deepseek_v3": [
        *BASELINES["top_k grouped"],
        "model.moe.first_k_dense_replace=1",
        "model.moe.shared_hidden=32",
        "model.router.balance_loss=1e-2",
        "model.router.balance_scope=sequence",
        "model.ffn_hidden=64",
    ],
    "gated, two dense": [
        *BASELINES["top_p grouped"],
        "model.moe.first_k_dense_replace=2",
        "model.moe.shared_hidden=32",
        "model.moe.shared_gate=true",
        "model.ffn_hidden=64",
        "optimizer.clip_grad=0.5",
    ],
    "top_p, four heads": [*ROUTERS["top_p"], "model.heads=4"],
    "top_p, long": [*ROUTERS["top_p"], *LONG, "model.attention_bias=all"],
    "top_p, latent": [*ROUTERS["top_p"], *LATENT, *LONG, "optimizer.clip_grad=0.5"],
    "da_moe, latent of keys alone": [*ATTENTIVE["da_moe"], *LATENT[:-1], "optimizer.clip_grad=0.5"],
    # Two layers in each of two interleaved stages.
    "longcat_flash": [*LONGCAT, "model.layers=8", "optimizer.clip_grad=0.5"],
    "top_p, Muon": [*ROUTERS["top_p"], "optimizer.kind=muon"],
    "top_p, two tokens further": [*ROUTERS["top_p"], "model.mtp.layers=2", "optimizer.clip_grad=0.5"],
    "latent, a token further, tied": [
        *ROUTERS["top_p"],
        *LATENT,
        "model.mtp.layers=1",
        "model.tie_embeddings=true",
        "optimizer.clip_grad=0.5",
        "model.moe.first_k_dense_replace=2",
        "model.ffn_hidden=64",
    ],
    "a token further, Muon": [*ROUTERS["top_p"], "model.mtp.layers=1", "optimizer.kind=muon"],
}
WHOLE = ["train.micro_batch=2"]
HALF = ["train.micro_batch=1"]
MEGATRON = "engine=megatron"
LAYOUTS = {
    "DeepSpeed EP 2": (2, [*HALF, "parallel.expert=2"]),
    "Megatron TP 2": (2, [MEGATRON, *WHOLE, "parallel.tensor=2"]),
    "Megatron PP 2": (2, [MEGATRON, *WHOLE, "parallel.pipeline=2"]),
    "Megatron PP 2 interleaved": (2, [MEGATRON, *WHOLE, "parallel.pipeline=2", "parallel.virtual_pipeline=2"]),
    "Megatron EP 2": (2, [MEGATRON, *HALF, "parallel.expert=2"]),
    "Megatron PP 2 x EP 2": (4, [MEGATRON, *HALF, "parallel.pipeline=2", "parallel.expert=2"]),
    "Megatron TP 2 x EP 2": (4, [MEGATRON, *HALF, "parallel.tensor=2", "parallel.expert=2"]),
    "Megatron TP 2 x PP 2": (4, [MEGATRON, *WHOLE, "parallel.tensor=2", "parallel.pipeline=2"]),
    "Megatron TP 2 x PP 2 x EP 2": (
        4,
        [MEGATRON, *WHOLE, "parallel.tensor=2", "parallel.pipeline=2", "parallel.expert=2"],
    ),
    "Megatron CP 2": (2, [MEGATRON, *WHOLE, "parallel.context=2"]),
    "Megatron CP 2 x PP 2": (4, [MEGATRON, *WHOLE, "parallel.context=2", "parallel.pipeline=2"]),
    "Megatron CP 2 x EP 2": (4, [MEGATRON, *HALF, "parallel.context=2", "parallel.expert=2"]),
    # With two heads of keys and values, which are repeated.
    "Megatron CP 4": (4, [MEGATRON, *WHOLE, "parallel.context=4"]),
    "Megatron CP 2 x TP 2": (4, [MEGATRON, *WHOLE, "parallel.context=2", "parallel.tensor=2"]),
}
FOUR_HEADS = ("Megatron CP 4", "Megatron CP 2 x TP 2")


@pytest.fixture(scope="module")
def table(summary):
    """Collects the differences from the plain model, printed after the tests."""
    summary += ["| layout | router | first loss | gradient norm | gradients | 20 losses |", "|---|---|---|---|---|---|"]
    return lambda *key, row: summary.append(f"| {' | '.join([*key, *(f'{value:.0e}' for value in row)])} |")


@pytest.fixture(scope="module")
def plain(one_rank):
    @functools.cache
    def run(name: str):
        (result,) = one_rank.run(train_plainly, [*COMMON, *MODELS[name], *WHOLE], STEPS)
        return result

    return run


def relative(ours: list[float], theirs: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))


# The fast tests cover each kind of parallelism, and models that differ in what is sharded.
FAST = {
    ("DeepSpeed EP 2", "top_p"),
    ("Megatron TP 2", "top_p, projections normalized"),
    ("Megatron TP 2", "seq_top_k"),
    ("Megatron PP 2", "gated, two dense"),
    ("Megatron PP 2", "latent, a token further, tied"),
    ("Megatron PP 2 interleaved", "top_p"),
    ("Megatron EP 2", "top_p"),
    ("Megatron CP 2", "top_p, long"),
    ("Megatron TP 2 x PP 2 x EP 2", "deepseek_v3"),
}
CASES = [
    pytest.param(layout, name, marks=() if (layout, name) in FAST else pytest.mark.slow)
    for layout in LAYOUTS
    for name in MODELS
    if layout not in FOUR_HEADS or name == "top_p, four heads"
]


@pytest.mark.parametrize(("layout", "name"), CASES)
def test_training_does_not_depend_on_engine_or_layout(
    table, plain, one_rank, two_ranks, four_ranks, tmp_path: Path, layout, name
):
    ranks, overrides = LAYOUTS[layout]
    overrides = [*COMMON, *MODELS[name], *overrides]
    pool = {2: two_ranks, 4: four_ranks}[ranks]
    expected = plain(name)
    saved = str(tmp_path / "saved")
    first = pool.run(train, overrides, 0, 1, "", saved)
    results = pool.run(train, overrides, 1, STEPS, saved)
    if MEGATRON in overrides:
        one_rank.run(to_canonical, [*COMMON, *MODELS[name]], saved, str(tmp_path / "plain"))
        saved = str(tmp_path / "plain")
    moments = {name: value for name, value in read_canonical(Path(saved)).items() if name.endswith("|exp_avg")}

    losses = first[0]["losses"] + results[0]["losses"]
    differences = [
        relative(losses[:1], expected["losses"][:1]),
        relative(first[0]["norms"], expected["norms"][:1]),
        largest_difference(moments, expected["moments"]),
        relative(losses, expected["losses"]),
    ]
    if config_for(*overrides).model.mtp.layers:
        further = first[0]["further"] + results[0]["further"]
        differences[0] = max(differences[0], relative(further[:1], expected["further"][:1]))
        differences[3] = max(differences[3], relative(further, expected["further"]))
    table(layout, name, row=differences)
    assert min(expected["norms"]) > config_for(*overrides).optimizer.clip_grad, "clipping is not active"
    assert expected["losses"][-1] < expected["losses"][0] - 0.3, "the model learned nothing: the comparison is weak"
    assert max(differences[:3]) <= 1e-5
    assert differences[3] <= 1e-4
    reference = maps_of_all_ranks([expected])
    for layer, ours in maps_of_all_ranks(first).items():
        passes = reference[layer][: len(ours)]  # of the first step
        assert all(torch.equal(a, b) for a, b in zip(ours, passes, strict=True)), layer
    assert sorted(maps_of_all_ranks(first)) == config_for(*overrides).model.moe_layers


# Routers whose state between steps, or choice in training, depends on the tokens of all ranks.
WITH_STATE = {
    **{kind: BASELINES[kind] for kind in (
        "quantile", "dtop_p", "expert_race", "identity_experts", "resonance", "seq_top_k", "top_p budgets",
    )},
    "da_moe": [*ATTENTIVE["da_moe"], "budget.method=pi", "budget.experts_per_token=1.5"],
    "quantile balancing": [*ROUTERS["top_k"], "budget.method=quantile"],
    "top_k grouped": [*BASELINES["top_k grouped"], "budget.method=loss_free", "budget.rate=0.01"],
    "sigmoid grouped": [
        *BASELINES["sigmoid grouped"], "budget.method=loss_free", "budget.experts_per_token=1.5",
    ],
}  # fmt: skip


FAST_WITH_STATE = {("Megatron TP 2 x EP 2", "quantile"), ("Megatron EP 2", "sigmoid grouped")}


@pytest.fixture(scope="module")
def alone(one_rank):
    @functools.cache
    def run(kind: str):
        (result,) = one_rank.run(train, [*COMMON, *WITH_STATE[kind], *WHOLE], 0, 6)
        return result

    return run


@pytest.mark.parametrize(
    ("layout", "kind"),
    [
        pytest.param(
            layout, kind,
            marks=() if (layout, kind) in FAST_WITH_STATE else pytest.mark.slow,
        )
        for layout in LAYOUTS if layout not in FOUR_HEADS for kind in WITH_STATE
    ],
)  # fmt: skip
def test_state_between_steps_does_not_depend_on_the_layout(alone, two_ranks, four_ranks, layout, kind):
    """Against DeepSpeed on one rank, with calibration and updates between steps."""
    ranks, overrides = LAYOUTS[layout]
    expected = alone(kind)
    results = {2: two_ranks, 4: four_ranks}[ranks].run(train, [*COMMON, *WITH_STATE[kind], *overrides], 0, 6)
    assert relative(results[0]["losses"], expected["losses"]) <= 1e-5
    assert relative(results[0]["norms"][:1], expected["norms"][:1]) <= 1e-5
    assert relative(results[0]["norms"], expected["norms"]) <= 1e-4
    reference = maps_of_all_ranks([expected])
    for layer, ours in maps_of_all_ranks(results).items():
        trained = zip(ours[-24:], reference[layer][-24:], strict=True)  # without the pass that calibrates
        assert all(torch.equal(a, b) for a, b in trained), layer
    assert sorted(maps_of_all_ranks(results)) == [0, 1, 2, 3]


@pytest.mark.slow
def test_a_recomputed_pass_finds_the_same_quantiles(alone, four_ranks):
    _, overrides = LAYOUTS["Megatron PP 2 x EP 2"]
    overrides = [*COMMON, *WITH_STATE["quantile"], *overrides, "train.recompute=full"]
    results = four_ranks.run(train, overrides, 0, 6)
    assert relative(results[0]["losses"], alone("quantile")["losses"]) <= 1e-5
    assert relative(results[0]["norms"], alone("quantile")["norms"]) <= 1e-5
