"""Adding and removing experts: the same decisions and new weights on every rank, in every layout."""

from __future__ import annotations

import itertools
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import set_checkpoint_early_stop

from dynmoe.config import load_config
from dynmoe.moe.adaptation import experts_to_remove, slot_to_fill
from dynmoe.moe.initialization import named_normal
from dynmoe.moe.router import initially_active
from dynmoe.routers import TopAny
from tests.engines.cases import config_for, train

ADAPTIVE = [
    "model.router.kind=top_any", "model.router.variant=improved", "model.router.initial_experts=1",
    "model.router.min_experts=0", "model.moe.experts=8", "model.moe.active_at_start=4", "adaptation.interval=20",
    "adaptation.window=10", "adaptation.removal_share=0.3", "train.micro_batch=4",
]  # fmt: skip
SHORT = ["adaptation.interval=10", "adaptation.window=5"]
MEGATRON = "engine=megatron"
PIPELINE = [MEGATRON, "parallel.pipeline=2"]


def layout(expert_parallel: int, stage: int) -> list[str]:
    return [f"parallel.expert={expert_parallel}", f"deepspeed.zero_stage={stage}"]


LAYOUTS = {
    f"DeepSpeed EP {expert_parallel} ZeRO {stage}": layout(expert_parallel, stage)
    for expert_parallel in (1, 2)
    for stage in (0, 1, 2, 3)
} | {"Megatron DP 2": [MEGATRON], "Megatron EP 2": [MEGATRON, "parallel.expert=2"], "Megatron PP 2": PIPELINE}
FAST = ("DeepSpeed EP 2 ZeRO 2",)


def experts_are_spread(overrides: list[str]) -> bool:
    return "parallel.expert=2" in overrides


def replicated(state: dict[str, torch.Tensor], overrides: list[str]) -> dict[str, torch.Tensor]:
    """State that two ranks replicate: all but sharded experts and the shards of Megatron's optimizer."""
    unlike = [".experts."] if experts_are_spread(overrides) else []
    unlike += ["|"] if MEGATRON in overrides else []
    return {name: value for name, value in state.items() if not any(part in name for part in unlike)}


def whole_part(results, rank: int, name: str, part: str, overrides: list[str]) -> torch.Tensor:
    """A master or moment of a parameter on ``rank``; joins Megatron's shards."""
    own = results[rank]["state"]
    if MEGATRON not in overrides or (experts_are_spread(overrides) and ".experts." in name):
        return own[f"{name}|{part}"].view_as(own[name])
    shards = [result["state"].get(f"{name}|{part}") for result in results]
    return torch.cat([shard for shard in shards if shard is not None]).view_as(own[name])


@pytest.mark.parametrize(
    "overrides", [pytest.param(v, id=k, marks=() if k in FAST else pytest.mark.slow) for k, v in LAYOUTS.items()]
)
def test_replicas_stay_bitwise_equal_through_removals_and_additions(two_ranks, overrides):
    first, second = two_ranks.run(train, [*ADAPTIVE, *SHORT, *overrides], 0, 100)
    assert {event.change for event in first["events"]} == {"removed", "added"}
    assert first["events"] == second["events"]
    assert {event.layer for event in first["events"]} == {0, 1}
    for event in first["events"]:
        assert event.rank == event.expert // (4 if experts_are_spread(overrides) else 8)
    if overrides == PIPELINE:
        return  # the two stages share no state
    ours, theirs = (replicated(result["state"], overrides) for result in (first, second))
    assert ours.keys() == theirs.keys()
    names = ["active_E", "prototypes_DE", "offset_E"]
    for name in names if MEGATRON in overrides else [*names, "prototypes_DE|param", "thresholds_E|exp_avg"]:
        assert any(key.endswith(name) for key in ours), name
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


@pytest.mark.parametrize(("stage", "precision"), [(1, "fp32"), (2, "bf16")])
@pytest.mark.slow
def test_replicas_of_spread_experts_stay_bitwise_equal(four_ranks, stage, precision):
    overrides = [*ADAPTIVE, "train.micro_batch=2", *layout(2, stage), f"train.precision={precision}"]
    results = four_ranks.run(train, overrides, 0, 60)
    assert {event.change for event in results[0]["events"]} == {"removed", "added"}
    for first, second in ((0, 2), (1, 3)):
        ours = results[first]["state"]
        theirs = results[second]["state"]
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.parametrize(
    ("overrides", "precision"),
    [
        (layout(2, 1), "bf16"), (layout(2, 3), "fp32"), (PIPELINE, "fp32"),
        *(
            pytest.param(*other, marks=pytest.mark.slow)
            for other in (
                (layout(1, 1), "fp32"), (layout(2, 0), "bf16"), (layout(2, 2), "fp32"),
                (LAYOUTS["Megatron DP 2"], "bf16"), (LAYOUTS["Megatron EP 2"], "bf16"),
            )
        ),
    ],
)  # fmt: skip
def test_a_new_expert_has_fresh_weights_fresh_masters_and_no_moments(two_ranks, overrides, precision):
    """Checked right after the update, and compared with an expert that stayed active."""
    results = two_ranks.run(train, [*ADAPTIVE, *overrides, f"train.precision={precision}"], 0, 20)
    added = [event for event in results[0]["events"] if event.change == "added"]
    assert added
    changed = {(event.layer, event.expert) for event in results[0]["events"]}
    spread = experts_are_spread(overrides)
    per_rank = 4 if spread else 8
    low = torch.float32 if precision == "fp32" else torch.bfloat16
    for event, rank in itertools.product(added, range(2)):
        moe = f"layers.{event.layer}.moe"
        state = results[rank]["state"]
        if f"{moe}.router.thresholds_E" not in state:
            continue  # of another stage
        parts = {f"{moe}.router.prototypes_DE": (slice(None), event.expert)}
        parts[f"{moe}.router.thresholds_E"] = (event.expert,)
        if not spread or rank == event.rank:
            parts[f"{moe}.experts.w_up_EHD"] = parts[f"{moe}.experts.w_down_EDF"] = (event.expert % per_rank,)
        for name, index in parts.items():
            master = whole_part(results, rank, name, "param", overrides)[index]
            assert torch.equal(state[name][index], master.to(low)), name
            for moment in ("exp_avg", "exp_avg_sq"):
                assert not whole_part(results, rank, name, moment, overrides)[index].any(), name
        if f"{moe}.experts.w_up_EHD" in parts:
            fresh = named_normal((64, 32), 0.1, 0, f"{moe}.experts.w_up.{event.expert}.step20")
            held = whole_part(results, rank, f"{moe}.experts.w_up_EHD", "param", overrides)
            assert torch.equal(held[event.expert % per_rank], fresh)
        prototypes = f"{moe}.router.prototypes_DE"
        norm = whole_part(results, rank, prototypes, "param", overrides)[:, event.expert].norm().item()
        assert norm == pytest.approx(1.0, abs=1e-5)
        active_E = state[f"buffer {moe}.router.active_E"]
        stayed = next(e for e in range(8) if active_E[e] and (event.layer, e) not in changed)
        moments = whole_part(results, rank, prototypes, "exp_avg", overrides)
        assert moments[:, stayed].any(), "the moments were wiped for all"


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(layout(2, 1), marks=pytest.mark.slow),
        layout(2, 3),
        [*layout(2, 3), "train.precision=bf16"],
        [*LAYOUTS["Megatron EP 2"], "train.precision=bf16"],
    ],
    ids=["ZeRO 1", "ZeRO 3", "ZeRO 3, bf16", "Megatron, bf16"],
)
def test_a_new_expert_can_start_from_the_weights_of_its_slot(two_ranks, overrides):
    """Those it was built with, up to weight decay, in fp32; its moments are new all the same."""
    results = two_ranks.run(train, [*ADAPTIVE, *overrides, "adaptation.weights=slot"], 0, 20)
    # Experts 0, 2, 4 and 6 are active from the start.
    unused = {event for event in results[0]["events"] if event.change == "added" and event.expert % 2}
    assert unused
    for event in unused:
        name = f"layers.{event.layer}.moe.experts.w_up_EHD"
        held, moment = (
            whole_part(results, event.rank, name, part, overrides)[event.expert % 4] for part in ("param", "exp_avg")
        )
        built = named_normal((64, 32), 0.1, 0, f"layers.{event.layer}.moe.experts.w_up.{event.expert}")
        if "train.precision=bf16" in overrides:  # masters are made from the weights of the model
            built = built.bfloat16().float()
        torch.testing.assert_close(held / held.norm(), built / built.norm(), rtol=1e-4, atol=1e-6)
        assert not moment.any()


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(overrides, marks=() if overrides in (layout(2, 2), PIPELINE) else pytest.mark.slow)
        for overrides in (layout(2, 1), layout(2, 2), LAYOUTS["Megatron EP 2"], PIPELINE)
    ],
)
def test_resuming_within_a_window_does_not_change_decisions(two_ranks, tmp_path, overrides):
    overrides = [*ADAPTIVE, *SHORT, *overrides]
    straight = two_ranks.run(train, overrides, 0, 22, "", str(tmp_path / "saved"), 17)
    resumed = two_ranks.run(train, overrides, 17, 22, str(tmp_path / "saved"))
    assert any(event.step == 20 for event in straight[0]["events"])
    for whole, after in zip(straight, resumed, strict=True):
        assert [event for event in whole["events"] if event.step > 17] == after["events"]
        assert all(torch.equal(value, after["state"][name]) for name, value in whole["state"].items())


def test_a_longer_window_after_a_resume_counts_no_step_again(two_ranks, tmp_path):
    overrides = [*ADAPTIVE, *SHORT, *layout(2, 1)]
    two_ranks.run(train, overrides, 0, 12, "", str(tmp_path / "saved"))
    resumed = two_ranks.run(train, [*overrides, "adaptation.window=9"], 12, 20, str(tmp_path / "saved"))
    config = config_for(*overrides)
    events = resumed[0]["events"]
    assert {event.step for event in events} == {20}
    tokens = {int(re.search(r"of (\d+) tokens", event.reason)[1]) for event in events}
    assert tokens == {8 * config.train.global_batch * config.data.sequence_length}, "of steps 13 to 20"


def test_all_layouts_make_the_same_decisions(one_rank, two_ranks):
    """One process, data parallelism, and expert parallelism with a policy that does not choose slots by rank."""
    overrides = [*ADAPTIVE, *SHORT, "adaptation.policy=released", "adaptation.removal_share=0"]
    (alone,) = one_rank.run(train, [*overrides, "train.micro_batch=8"], 0, 21)
    wanted = [(event.step, event.layer, event.expert, event.change) for event in alone["events"]]
    assert wanted
    for expert_parallel in (1, 2):
        spread = two_ranks.run(train, [*overrides, *layout(expert_parallel, 1)], 0, 21)[0]
        assert [(event.step, event.layer, event.expert, event.change) for event in spread["events"]] == wanted


def train_with_whole_repetitions(*arguments: Any) -> dict[str, Any]:
    """Recomputation repeats all of a forward pass, not only what the backward pass needs: counting is in the rest."""
    with set_checkpoint_early_stop(False):
        return train(*arguments)


def test_windows_count_optimizer_steps(one_rank):
    """Windows do not count forward passes: neither accumulation nor recomputation records a token twice."""
    few = ["train.micro_batch=8", *layout(1, 1)]
    (plain,) = one_rank.run(train, [*ADAPTIVE, *few], 0, 20)
    (again,) = one_rank.run(train_with_whole_repetitions, [*ADAPTIVE, *few, "train.recompute=full"], 0, 20)
    (quarters,) = one_rank.run(train, [*ADAPTIVE, *few, "train.micro_batch=2"], 0, 20)
    assert plain["events"]
    assert quarters["events"]
    assert again["events"] == plain["events"]
    assert all(f"of {10 * 8 * 24} tokens" in event.reason for result in (plain, quarters) for event in result["events"])


@pytest.mark.parametrize(
    ("active", "load", "share", "removed"),
    [
        ([1, 1, 1, 1], [5, 0, 7, 0], 0.0, [1, 3]),
        ([1, 0, 1, 1], [5, 0, 7, 0], 0.0, [3]),  # an inactive slot is not removed again
        ([1, 1, 1, 1], [9, 1, 9, 5], 0.2, [1]),  # at most 0.2 of the mean load, 6
        ([1, 1, 1, 1], [6, 6, 6, 6], 0.9, []),
        ([0, 1, 1, 0], [0, 0, 0, 0], 0.0, []),  # if no expert was selected, the thresholds are wrong, not the experts
    ],
)
def test_removal_in_cases_computed_by_hand(active, load, share, removed):
    assert experts_to_remove(torch.tensor(active).bool(), torch.tensor(load).double(), share) == removed


def test_removal_keeps_the_required_number_of_experts():
    active = torch.ones(5).bool()
    load = torch.tensor([9.0, 0.0, 1.0, 0.0, 0.0])
    assert experts_to_remove(active, load, 0.5, min_active=1) == [1, 2, 3, 4]
    assert experts_to_remove(active, load, 0.5, min_active=3) == [3, 4]  # ties keep the lower index


@pytest.mark.parametrize(
    ("active", "ranks", "slot"),
    [
        ([1, 1, 0, 1, 0, 0], 1, 2),  # the first free slot
        ([1, 1, 0, 1, 0, 0], 2, 4),  # the second rank has one active expert, the first two
        ([1, 1, 0, 0], 2, 2),
        ([1, 0, 1, 0], 2, 1),  # a tie goes to the lower rank
        ([1, 1, 1, 1], 2, None),
    ],
)
def test_slot_of_a_new_expert_in_cases_computed_by_hand(active, ranks, slot):
    assert slot_to_fill(torch.tensor(active).bool(), ranks) == slot


def test_a_new_prototype_points_at_the_tokens_without_experts():
    state = SimpleNamespace(
        offset_E=torch.tensor([0.1, 0.2, 0.6, 9.0]), thresholds_E=torch.zeros(4),
        window_unclaimed_D=torch.tensor([3.0, 0.0, -4.0], dtype=torch.float64),
    )  # fmt: skip
    fresh = TopAny().new_expert(state, slot=3, active_E=torch.arange(4) < 3, at_median=True)
    assert fresh["prototypes_DE"][0] == (slice(None), 3)
    assert fresh["prototypes_DE"][1].tolist() == pytest.approx([0.6, 0.0, -0.8])
    assert state.offset_E.tolist() == pytest.approx([0.1, 0.2, 0.6, 0.2])


def test_active_experts_at_the_start_are_spread_over_ranks():
    assert initially_active(8, 4, spread=True).nonzero().flatten().tolist() == [0, 2, 4, 6]
    assert initially_active(8, 3, spread=False).nonzero().flatten().tolist() == [0, 1, 2]
    assert config_for(*ADAPTIVE).model.moe.active_at_start == 4
    assert load_config().model.moe.active_at_start is None
