"""Training does not depend on data or expert parallelism, ZeRO, gradient accumulation or recomputation."""

from __future__ import annotations

import functools

import pytest
import torch

from tests.engines.cases import GLOBAL_BATCH, LENGTH, refusal, step_that_fails, train, train_into_nan
from tests.engines.comparisons import check_that_it_continued, maps_of_all_ranks, read_canonical
from tests.moe.cases import BASELINES, LONGCAT, ROUTERS

STEPS = 20
ONE = ["train.micro_batch=8"]
HALF = ["train.micro_batch=4"]
NO_LOSSES = {
    "top_k": ["model.router.balance_loss=0"],
    "top_p": ["model.router.balance_loss=0", "model.router.entropy_loss=0"],
    "top_any": ["model.router.diversity_loss=0", "model.router.simplicity_loss=0"],
}
# Losses over single tokens or parameters, which do not depend on micro-batches. Balance losses do.
WITHOUT_BALANCE = {
    "top_k": ["model.router.balance_loss=0", "model.router.z_loss=1e-2"],
    "top_p": ["model.router.balance_loss=0", "model.router.entropy_loss=1e-2", "model.router.z_loss=1e-2"],
    "top_any": ["model.router.efficiency_loss=1e-2"],
}
# All losses of a router together, including those that need counts over all ranks.
ALL_LOSSES = {
    "top_k": ["model.router.z_loss=1e-3", "model.router.entropy_loss=1e-3"],
    "top_p": ["model.router.z_loss=1e-3"],
    "top_any": ["model.router.balance_loss=1e-2", "model.router.efficiency_loss=1e-2"],
}
MODELS = {"top_p": ROUTERS["top_p"], "longcat_flash": LONGCAT}


def assert_same_maps(results, alone) -> None:
    reference = maps_of_all_ranks([alone])
    for layer, passes in maps_of_all_ranks(results).items():
        assert all(torch.equal(a, b) for a, b in zip(passes, reference[layer], strict=True)), layer


@pytest.fixture(scope="module")
def alone(one_rank):
    @functools.cache
    def run(kind: str):
        (result,) = one_rank.run(train, [*ROUTERS[kind], *ALL_LOSSES[kind], *ONE], 0, STEPS)
        return result

    return run


@pytest.mark.parametrize("kind", sorted(ROUTERS))
@pytest.mark.parametrize("expert_parallel", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_two_ranks_train_like_one_with_auxiliary_losses(alone, two_ranks, kind, expert_parallel):
    overrides = [*ROUTERS[kind], *ALL_LOSSES[kind], *HALF, f"parallel.expert={expert_parallel}"]
    results = two_ranks.run(train, overrides, 0, STEPS)
    expected = alone(kind)
    assert results[0]["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert results[0]["norms"] == pytest.approx(expected["norms"], rel=1e-4)
    assert results[0]["losses"] == results[1]["losses"]
    assert expected["losses"][-1] < expected["losses"][0] - 0.3, "the model learned nothing: the comparison is weak"
    assert_same_maps(results, expected)
    assert results[0]["rows"] == expected["rows"]
    for ours, one_process in zip(results[0]["statistics"], expected["statistics"], strict=True):
        for layer, vector in ours.items():
            reference = one_process[layer]
            # Two ranks run two passes of half the tokens: counts stay the same, values per pass are added twice.
            assert vector[0] == 2 * reference[0]
            counts = -(4 + 1 + 4)  # histogram of K and load per expert
            assert vector[counts:] == reference[counts:]


@pytest.mark.parametrize("kind", sorted(BASELINES))
def test_baseline_routers_train_like_one_rank(one_rank, two_ranks, kind):
    """Includes their state between steps: cut-offs, the L1 coefficient, calibrated thresholds."""
    overrides = [*BASELINES[kind], "optimizer.lr=1e-3"]
    (alone,) = one_rank.run(train, [*overrides, *ONE], 0, 10)
    results = two_ranks.run(train, [*overrides, *HALF, "parallel.expert=2"], 0, 10)
    assert results[0]["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    assert results[0]["norms"] == pytest.approx(alone["norms"], rel=1e-4)
    assert_same_maps(results, alone)


@pytest.mark.parametrize("kind", [pytest.param(k, marks=() if k == "top_p" else pytest.mark.slow) for k in ROUTERS])
def test_accumulation_changes_nothing_without_auxiliary_losses(one_rank, two_ranks, kind):
    overrides = [*ROUTERS[kind], *NO_LOSSES[kind]]
    (whole,) = one_rank.run(train, [*overrides, *ONE], 0, STEPS)
    (halves,) = one_rank.run(train, [*overrides, *HALF], 0, STEPS)
    spread = two_ranks.run(train, [*overrides, "train.micro_batch=2", "parallel.expert=2"], 0, STEPS)[0]
    assert halves["losses"] == pytest.approx(whole["losses"], rel=1e-5)
    assert spread["losses"] == pytest.approx(whole["losses"], rel=1e-5)
    assert halves["rows"] == whole["rows"] == spread["rows"]


@pytest.mark.parametrize("kind", sorted(ROUTERS))
def test_losses_that_are_means_over_tokens_do_not_depend_on_micro_batches(one_rank, kind):
    """Their scale follows the accumulation. Few steps, as rounding may flip a route later."""
    overrides = [*ROUTERS[kind], *WITHOUT_BALANCE[kind], "optimizer.clip_grad=0"]
    (whole,) = one_rank.run(train, [*overrides, *ONE], 0, 5)
    (quarters,) = one_rank.run(train, [*overrides, "train.micro_batch=2"], 0, 5)
    assert quarters["losses"] == pytest.approx(whole["losses"], rel=1e-5)
    assert quarters["norms"] == pytest.approx(whole["norms"], rel=1e-5)


# Without losses that depend on micro-batches.
SMOOTH = {
    "top_p": [*ROUTERS["top_p"], *WITHOUT_BALANCE["top_p"]],
    "longcat_flash": [*LONGCAT, "model.router.balance_loss=0"],
}


@pytest.fixture(scope="module")
def exact(one_rank):
    """Six steps in fp32 on one rank, each in one pass."""

    @functools.cache
    def run(model: str):
        (result,) = one_rank.run(train, [*SMOOTH[model], *ONE], 0, 6)
        return result

    return run


@pytest.mark.parametrize(
    ("stage", "precision", "model"),
    [
        *[(stage, "fp32", "top_p") for stage in (0, 1, 2, 3)], (2, "bf16", "top_p"), (3, "fp32", "longcat_flash"),
        *[pytest.param(stage, "bf16", "top_p", marks=pytest.mark.slow) for stage in (0, 1, 3)],
        pytest.param(1, "bf16", "longcat_flash", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_zero_stages_agree_and_resume_bitwise(exact, two_ranks, tmp_path, stage, precision, model):
    """Norms too, with two passes per step: AdamW hides a constant factor of gradients from losses."""
    layout = ["train.micro_batch=2", "parallel.expert=2", *SMOOTH[model]]
    overrides = [*layout, f"deepspeed.zero_stage={stage}", f"train.precision={precision}"]
    straight = two_ranks.run(train, overrides, 0, 6, "", str(tmp_path / "saved"), 3)
    resumed = two_ranks.run(train, overrides, 3, 6, str(tmp_path / "saved"))
    check_that_it_continued(straight, resumed, 3, ("losses", "norms"))
    of_losses, of_norms = (1e-6, 1e-4) if precision == "fp32" else (5e-3, 2e-2)
    assert straight[0]["losses"] == pytest.approx(exact(model)["losses"], rel=of_losses)
    assert straight[0]["norms"] == pytest.approx(exact(model)["norms"], rel=of_norms)


def test_a_limit_drops_the_same_routes_with_expert_parallelism_and_recomputation(two_ranks):
    """As in most configurations that ship: routes beyond the mean experts per token of a pass are dropped."""
    most = 1.25
    limited = [
        *ROUTERS["top_p"], *HALF, f"model.moe.max_mean_experts_per_token={most}", "model.moe.on_overflow=drop",
        "budget.method=pi", "budget.experts_per_token=1.1",
    ]  # fmt: skip
    alone, spread, repeated = (
        two_ranks.run(train, [*limited, *more], 0, 6)[0]
        for more in ([], ["parallel.expert=2"], ["parallel.expert=2", "train.recompute=full"])
    )
    rows = [number for step in alone["rows"] for number in step.values()]
    assert max(rows) == most * GLOBAL_BATCH * LENGTH, "nothing was dropped"
    assert spread["rows"] == alone["rows"]
    assert spread["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    assert spread["norms"] == pytest.approx(alone["norms"], rel=1e-4)
    assert repeated["losses"] == spread["losses"]
    assert repeated["norms"] == spread["norms"]


@pytest.mark.parametrize(
    ("stage", "optimizer"), [*[(stage, "adamw") for stage in (0, 1, 2, 3)], *[(stage, "muon") for stage in (0, 1, 2)]]
)
def test_a_bf16_run_begins_with_masters_of_the_initial_weights(one_rank, stage, optimizer):
    """Before the first step, whatever DeepSpeed does to set up its optimizers."""
    overrides = [*ONE, "train.precision=bf16", f"deepspeed.zero_stage={stage}", f"optimizer.kind={optimizer}"]
    (begun,) = one_rank.run(train, overrides, 0, 0)
    weights = {name: value for name, value in begun["state"].items() if f"{name}|param" in begun["state"]}
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    for name, value in weights.items():
        assert torch.equal(begun["state"][f"{name}|param"], value.float()), name


@pytest.fixture(scope="module")
def whole_run(one_rank):
    return one_rank.run(train, [*ONE, "deepspeed.zero_stage=0"], 0, 55)[0]["losses"]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param(2, (0, 0), id="one rank", marks=pytest.mark.slow),
        pytest.param(2, (1, 1), id="DP 2", marks=pytest.mark.slow),
        pytest.param(2, (1, 2), id="EP 2, another stage"),
        pytest.param(2, (3, 1), id="to DP 2 with ZeRO 3", marks=pytest.mark.slow),
        pytest.param(3, (1, 0), id="from ZeRO 3 to one rank"),
    ],
)
def test_f19_a_checkpoint_fits_other_layouts(whole_run, one_rank, two_ranks, tmp_path, before, after):
    """Saved under EP 2: saving it again is bitwise identical, and training continues as on one rank."""
    saved = tmp_path / "saved"
    again = tmp_path / "again"
    two_ranks.run(train, [*HALF, "parallel.expert=2", f"deepspeed.zero_stage={before}"], 0, 5, "", str(saved))
    stage, expert_parallel = after
    pool = two_ranks if expert_parallel else one_rank
    layout = [*HALF, f"parallel.expert={expert_parallel}"] if expert_parallel else ONE
    overrides = [*layout, f"deepspeed.zero_stage={stage}"]
    pool.run(train, overrides, 5, 5, str(saved), str(again))
    tensors = read_canonical(saved)
    assert {name.split("|")[-1] for name in tensors} >= {"param", "exp_avg", "exp_avg_sq"}
    assert tensors.keys() == read_canonical(again).keys()
    assert all(torch.equal(value, tensors[name]) for name, value in read_canonical(again).items())
    assert pool.run(train, overrides, 5, 55, str(saved))[0]["losses"] == pytest.approx(whole_run[5:], rel=1e-4)


@pytest.mark.parametrize(("stage", "model"), [(1, "top_p"), (3, "top_p"), (1, "longcat_flash")])
def test_recomputation_changes_nothing(two_ranks, stage, model):
    overrides = [*HALF, "parallel.expert=2", f"deepspeed.zero_stage={stage}", *MODELS[model]]
    plain = two_ranks.run(train, overrides, 0, 4)[0]
    for recompute in ("selective", "full"):
        again = two_ranks.run(train, [*overrides, f"train.recompute={recompute}"], 0, 4)[0]
        assert again["losses"] == plain["losses"]
        assert again["rows"] == plain["rows"]
        assert again["statistics"] == plain["statistics"]
        assert again["attentions"] == 2 * plain["attentions"], "nothing was recomputed"


def test_clipping_uses_the_norm_of_the_whole_model(one_rank, two_ranks):
    (alone,) = one_rank.run(train, [*ONE, "optimizer.clip_grad=0.1"], 0, 5)
    for expert_parallel in (1, 2):
        overrides = [*HALF, "optimizer.clip_grad=0.1", f"parallel.expert={expert_parallel}"]
        spread = two_ranks.run(train, overrides, 0, 5)[0]
        assert min(spread["norms"]) > 0.1, "clipping was never active"
        assert spread["norms"] == pytest.approx(alone["norms"], rel=1e-5)
        assert spread["losses"] == pytest.approx(alone["losses"], rel=1e-5)


def test_a_checkpoint_of_another_model_is_refused_by_name(one_rank, tmp_path):
    saved = str(tmp_path / "saved")
    one_rank.run(train, ONE, 0, 1, "", saved)
    for change, said in (("model.moe.expert_hidden=64", "this model needs"), ("model.layers=1", "this model lacks")):
        (message,) = one_rank.run(refusal, [*ONE, change], saved)
        assert message.startswith("checkpoint"), message
        assert said in message


@pytest.mark.parametrize(("stage", "model"), [(1, "top_p"), (3, "top_p"), (3, "longcat_flash")])
def test_expert_and_data_parallelism_together_train_like_one_process(one_rank, four_ranks, tmp_path, stage, model):
    overrides = [*MODELS[model], "model.router.z_loss=1e-3", f"deepspeed.zero_stage={stage}"]
    saved = str(tmp_path / "saved")
    (alone,) = one_rank.run(train, [*overrides, *ONE], 0, 8)
    quarter = [*overrides, "train.micro_batch=2", "parallel.expert=2"]
    spread = four_ranks.run(train, quarter, 0, 4, "", saved)
    assert spread[0]["losses"] == pytest.approx(alone["losses"][:4], rel=1e-5)
    assert spread[0]["norms"] == pytest.approx(alone["norms"][:4], rel=1e-4)
    # Replicas of an expert are two ranks apart and stay bitwise identical.
    for first, second in ((0, 2), (1, 3)):
        assert all(torch.equal(v, spread[second]["state"][n]) for n, v in spread[first]["state"].items())
    resumed = four_ranks.run(train, [*quarter, "parallel.expert=4"], 4, 8, saved)[0]
    assert resumed["losses"] == pytest.approx(alone["losses"][4:], rel=1e-5)


@pytest.mark.parametrize("engine", ["deepspeed", "megatron"])
def test_f17_exceeding_the_limit_stops_every_rank_before_the_optimizer_and_names_the_options(two_ranks, engine):
    overrides = [
        f"engine={engine}",
        *HALF,
        "parallel.expert=2",
        "model.router.p=0.9",
        "model.moe.max_mean_experts_per_token=1",
    ]
    for message, untouched in two_ranks.run(step_that_fails, overrides):
        assert message.startswith(
            "step 1: tokens select more experts than model.moe.max_mean_experts_per_token=1.0 allows in layer 0 "
            "on rank 0, 1; "
        )
        assert "raise it, lower model.router.max_experts, or drop routes with model.moe.on_overflow=drop" in message
        assert untouched


@pytest.mark.parametrize(("kind", "stage"), [*((kind, 1) for kind in sorted(ROUTERS)), ("top_p", 3)])
def test_nonfinite_scores_stop_every_rank_and_name_step_layer_and_rank(two_ranks, kind, stage):
    overrides = [*ROUTERS[kind], *HALF, "parallel.expert=2", f"deepspeed.zero_stage={stage}"]
    messages = two_ranks.run(train_into_nan, overrides, 1, 1)
    for message, untouched in messages:
        assert message.startswith("step 3: router scores are not finite in layer 1 on rank 1; "), message
        assert untouched
