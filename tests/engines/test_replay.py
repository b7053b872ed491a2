"""A run with the experts of another run's traces: from the same weights the same losses, else its own gates."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from tests.engines.routing_cases import refused_replay, train_and_trace

STEPS = 3
MEGATRON = "engine=megatron"
PLACE = ["step", "layer", "sample", "position"]
WHOLE = ["train.micro_batch=4", "model.kv_heads=2", "model.layers=4"]
DROPS = ["model.moe.capacity_factor=0.8"]
ONE = ["model.router.max_experts=1"]
# The router of the traced run, and fields that change which experts the replaying run would select by itself.
ROUTERS = {
    "top_k": (["model.router.kind=top_k", "model.router.z_loss=1e-3"], ["model.router.k=1"]),
    "top_k, renormalized": (["model.router.kind=top_k", "model.router.renormalize=true"], ["model.router.k=3"]),
    "top_p": (["model.router.kind=top_p"], ["model.router.p=0.9"]),
    "top_p with drops": (["model.router.kind=top_p", *DROPS], ["model.router.p=0.9"]),
    "top_any": (["model.router.kind=top_any", "model.router.balance_loss=1e-2"], ONE),
    # Not the improved variant, which calibrates thresholds on its own experts.
    "top_any, scores": (["model.router.kind=top_any", "model.router.weights=score", "model.router.renormalize=true",
                         "model.router.temperature=sqrt_hidden", "model.router.efficiency_loss=1e-2"], ONE),
    "top_any released": (["model.router.kind=top_any", "model.router.variant=released"], ONE),
    "sigmoid": (["model.router.kind=sigmoid", "model.router.balance_loss=1e-2"], ["model.router.cutoff=0.6"]),
    "null_experts": (["model.router.kind=null_experts", "model.router.num_null=4", "model.router.balance_loss=0"],
                     ["model.router.k=4"]),
}  # fmt: skip
LAYOUTS = {
    "DeepSpeed EP 2, accumulation 2": ["train.micro_batch=2", "parallel.expert=2"],
    "DeepSpeed EP 2, recomputed": ["train.micro_batch=2", "parallel.expert=2", "train.recompute=full"],
    "Megatron PP 2, recomputed": [MEGATRON, "train.micro_batch=2", "parallel.pipeline=2", "train.recompute=full"],
    "Megatron PP 2 interleaved": [MEGATRON, "train.micro_batch=2", "parallel.pipeline=2",
                                  "parallel.virtual_pipeline=2"],
    "Megatron TP 2": [MEGATRON, "parallel.tensor=2"],
    "Megatron EP 2": [MEGATRON, "parallel.expert=2"],
}  # fmt: skip


def read(folder: Path) -> pd.DataFrame:
    return pd.read_parquet(folder).sort_values(PLACE, ignore_index=True)


def routes(trace: pd.DataFrame) -> list[tuple[list[int], list[int]]]:
    return [(list(own), list(dropped)) for own, dropped in zip(trace["experts"], trace["dropped"], strict=True)]


@pytest.mark.parametrize("name", ROUTERS)
def test_the_same_weights_and_experts_give_bitwise_the_same_losses(one_rank, tmp_path, name):
    fields, selecting = ROUTERS[name]
    first, replayed, alone = (str(tmp_path / name) for name in ("first", "replayed", "alone"))
    (expected,) = one_rank.run(train_and_trace, [*WHOLE, *fields], STEPS, first)
    (ours,) = one_rank.run(train_and_trace, [*WHOLE, *fields, *selecting], STEPS, replayed, first)
    assert ours["seen"] == expected["seen"]
    pd.testing.assert_frame_equal(read(Path(replayed)), read(Path(first)))
    (other,) = one_rank.run(train_and_trace, [*WHOLE, *fields, *selecting], STEPS, alone)
    assert other["seen"] != expected["seen"], "the replaying run would select these experts anyway"


def test_a_controller_of_experts_that_do_not_respond_rests(one_rank, tmp_path):
    """Without that, the penalty of relu would grow without end."""
    first, replayed = (str(tmp_path / name) for name in ("first", "replayed"))
    fields = [*WHOLE, "model.router.kind=relu", "budget.experts_per_token=2"]
    (expected,) = one_rank.run(train_and_trace, fields, STEPS, first)
    (ours,) = one_rank.run(train_and_trace, fields, STEPS, replayed, first)
    (begun,) = one_rank.run(train_and_trace, fields, 1, str(tmp_path / "begun"), first)
    assert ours["seen"][0] == expected["seen"][0]
    assert routes(read(Path(replayed))) == routes(read(Path(first)))
    assert ours["control"] == begun["control"]
    assert all(a != b for a, b in zip(ours["control"], expected["control"], strict=True))


@pytest.mark.parametrize("kind", ["expert_threshold", "quantile", "resonance", "seq_top_k"])
def test_cut_offs_follow_the_scores_in_a_replay_too(one_rank, tmp_path, kind):
    first, replayed = (str(tmp_path / name) for name in ("first", "replayed"))
    bins = ["model.router.bins=16"] if kind == "quantile" else []
    fields = [*WHOLE, f"model.router.kind={kind}", "budget.experts_per_token=2", *bins]
    (expected,) = one_rank.run(train_and_trace, fields, STEPS, first)
    (ours,) = one_rank.run(train_and_trace, fields, STEPS, replayed, first)
    assert ours["seen"] == expected["seen"]
    assert ours["control"] == expected["control"]


@pytest.fixture(scope="module")
def of_one_rank(one_rank, tmp_path_factory):
    """Traces of a run on one rank, whose capacity drops routes."""
    folder = tmp_path_factory.mktemp("traces")
    one_rank.run(train_and_trace, [*WHOLE, "model.router.kind=top_p", *DROPS], STEPS, str(folder))
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_replays_the_traces_of_another(two_ranks, of_one_rank, tmp_path, layout):
    """With other weights, and thus other experts of its own; gates are the scores of the traced experts."""
    overrides = [*WHOLE, "model.router.kind=top_p", "train.seed=1", *LAYOUTS[layout]]
    replayed, alone = (tmp_path / name for name in ("replayed", "alone"))
    results = two_ranks.run(train_and_trace, overrides, STEPS, str(replayed), str(of_one_rank))
    expected = read(of_one_rank)
    ours = read(replayed)
    assert ours[[*PLACE, "token"]].equals(expected[[*PLACE, "token"]])
    assert routes(ours) == routes(expected)
    assert any(dropped for _, dropped in routes(expected))
    assert not all((a == b).all() for a, b in zip(ours["gates"], expected["gates"], strict=True))
    for plan in (plan for result in results for plan in result["plans"].values()):
        for scores, gates, routed in zip(plan["scores"], plan["gates"], plan["routed"], strict=True):
            assert gates == [score if on else 0.0 for score, on in zip(scores, routed, strict=True)]
    two_ranks.run(train_and_trace, overrides, 1, str(alone))
    assert routes(read(alone)) != routes(expected)[: len(read(alone))]


def test_every_rank_refuses_what_one_rank_misses(two_ranks, of_one_rank, tmp_path):
    """Otherwise the others would wait for it. Here the trace lacks a sample of the second rank."""
    (file,) = (of_one_rank / "step_00000001").iterdir()
    trace = pd.read_parquet(file)
    folder = tmp_path / "cut" / "step_00000001"
    folder.mkdir(parents=True)
    trace[(trace["sample"] != 5) | (trace["layer"] != 2)].to_parquet(folder / "rank_00000.parquet")
    errors = two_ranks.run(
        refused_replay, [*WHOLE, "model.router.kind=top_p"], 1, str(tmp_path / "own"), str(tmp_path / "cut")
    )
    assert errors[0] == errors[1]
    assert errors[0].startswith(f"train.replay: {folder}: layer 2: position 0 of sample 5 is missing; replay with")
