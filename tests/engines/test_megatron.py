"""Megatron layouts do not change checkpoints, statistics or state; test_layouts.py covers training itself."""

from __future__ import annotations

import functools
import re
from importlib import metadata
from pathlib import Path

import pytest
import torch

from dynmoe.engines import make_engine
from dynmoe.errors import ConfigError
from tests.engines.cases import (
    config_for,
    forward_only,
    refusal,
    to_canonical,
    train,
    train_into_nan,
    train_plainly,
    warnings_of_a_save,
)
from tests.engines.comparisons import check_that_it_continued, maps_of_all_ranks, read_canonical
from tests.golden.make_megatron import FIELDS
from tests.moe.cases import ATTENTIVE, BASELINES, LATENT, LONGCAT, ROUTERS

GOLDEN = Path(__file__).parents[1] / "golden"

BASE = ["engine=megatron", "model.layers=4", "model.kv_heads=2", "model.router.z_loss=1e-3"]
# Every forward pass, over all ranks, has the same two sequences.
ALONE = ["train.micro_batch=2"]
DP2 = ["train.micro_batch=1"]
EP2 = [*DP2, "parallel.expert=2"]
TP2 = [*ALONE, "parallel.tensor=2"]
PP2 = [*ALONE, "parallel.pipeline=2"]
INTERLEAVED = [*PP2, "parallel.virtual_pipeline=2"]


def reads_common_state() -> bool:
    from packaging.version import Version

    return Version(metadata.version("megatron-core")) >= Version("0.19")


def pool_of(overrides: list[str], one_rank, two_ranks):
    return one_rank if overrides == ALONE else two_ranks


@pytest.fixture(scope="module")
def plain(one_rank):
    @functools.cache
    def run(*extra: str, steps: int = 25):
        overrides = [part for part in BASE if part != "engine=megatron"]
        return one_rank.run(train_plainly, [*overrides, *ALONE, *extra], steps)[0]

    return run


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param(EP2, ALONE, id="EP 2 to 1"),
        pytest.param(ALONE, EP2, id="EP 1 to 2", marks=pytest.mark.slow),
        pytest.param(PP2, ALONE, id="PP 2 to 1", marks=pytest.mark.slow),
        pytest.param(ALONE, TP2, id="TP 1 to 2", marks=pytest.mark.slow),
        pytest.param(ALONE, DP2, id="DP 1 to 2", marks=pytest.mark.slow),
        pytest.param(EP2, INTERLEAVED, id="EP 2 to PP 2 interleaved", marks=pytest.mark.slow),
    ],
)
def test_f19_a_checkpoint_fits_another_layout(plain, one_rank, two_ranks, tmp_path, before, after):
    saved = tmp_path / "saved"
    again = tmp_path / "again"
    pool_of(before, one_rank, two_ranks).run(train, [*BASE, *before], 0, 5, "", str(saved))
    pool = pool_of(after, one_rank, two_ranks)
    pool.run(train, [*BASE, *after], 5, 5, str(saved), str(again))
    tensors = []
    for path in (saved, again):
        one_rank.run(to_canonical, BASE, str(path), str(tmp_path / f"{path.name} plain"))
        tensors.append(read_canonical(tmp_path / f"{path.name} plain"))
    assert tensors[0].keys() == tensors[1].keys()
    assert {name.split("|")[-1] for name in tensors[0]} >= {"param", "exp_avg", "exp_avg_sq"}
    assert all(torch.equal(value, tensors[1][name]) for name, value in tensors[0].items())
    result = pool.run(train, [*BASE, *after], 5, 55, str(saved))[0]
    assert result["losses"] == pytest.approx(plain(steps=55)["losses"][5:], rel=1e-4)


@pytest.mark.parametrize("layout", [DP2, EP2], ids=["DP 2", "EP 2"])
def test_ranks_save_the_same_common_state(two_ranks, tmp_path, layout):
    assert two_ranks.run(warnings_of_a_save, [*BASE, *layout], str(tmp_path / "saved")) == [[], []]


@pytest.mark.parametrize("version", ["0.16", "0.19"])
def test_checkpoints_of_other_versions_are_read(one_rank, tmp_path, version):
    """Masters and moments are bitwise identical; an older Megatron-Core refuses the newer format."""
    saved = GOLDEN / f"megatron_{version.replace('.', '_')}"
    if version == "0.19" and not reads_common_state():
        (said,) = one_rank.run(refusal, FIELDS, str(saved))
        assert re.search(r"has no common\.pt: Megatron-Core 0\.19 or later wrote it", said)
        return
    one_rank.run(to_canonical, FIELDS, str(saved), str(tmp_path / "plain"))
    read = read_canonical(tmp_path / "plain")
    expected = read_canonical(saved / "plain")
    assert read.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in read.items())


@pytest.mark.parametrize(
    ("before", "after", "extra"),
    [
        pytest.param(TP2, ALONE, ["model.moe.moe_layer_freq=2", "model.ffn_hidden=64", "model.moe.shared_hidden=32"],
                     id="dense layers and shared experts"),
        pytest.param(PP2, TP2, ["model.tie_embeddings=true"], id="tied embeddings", marks=pytest.mark.slow),
        pytest.param(ALONE, TP2, ["model.moe.experts=0", "model.ffn_hidden=64"], id="a dense model"),
        pytest.param(TP2, ALONE, LATENT, id="latent attention", marks=pytest.mark.slow),
        pytest.param(PP2, TP2, LONGCAT, id="LongCat-Flash", marks=pytest.mark.slow),
        pytest.param(PP2, TP2, ["model.mtp.layers=2"], id="further tokens", marks=pytest.mark.slow),
        pytest.param(TP2, PP2, ["model.mtp.layers=1", "model.tie_embeddings=true"],
                     id="further tokens, tied embeddings"),
    ],
)  # fmt: skip
def test_checkpoints_of_other_architectures_fit_other_layouts(
    plain, one_rank, two_ranks, tmp_path, before, after, extra
):
    base = [*BASE, "model.router.z_loss=0", *extra]
    saved = str(tmp_path / "saved")
    first = pool_of(before, one_rank, two_ranks).run(train, [*base, *before], 0, 2, "", saved)[0]
    second = pool_of(after, one_rank, two_ranks).run(train, [*base, *after], 2, 5, saved)[0]
    one_rank.run(to_canonical, base, saved, str(tmp_path / "plain"))
    expected = plain("model.router.z_loss=0", *extra, steps=5)
    assert first["losses"] + second["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    (alone,) = one_rank.run(train, [*base, "engine=deepspeed", *ALONE], 2, 5, str(tmp_path / "plain"))
    assert alone["losses"] == pytest.approx(expected["losses"][2:], rel=1e-5)


def test_precision_and_optimizer_may_change_on_resume(two_ranks, tmp_path):
    """Masters are exact in any precision, on every replica; hyperparameters come from the configuration."""
    saved = str(tmp_path / "saved")
    low = [*BASE, *DP2, "train.precision=bf16"]
    half = two_ranks.run(train, low, 0, 2, "", saved)
    whole = two_ranks.run(train, [*BASE, *DP2], 2, 2, saved)
    assert all(torch.equal(value, whole[1]["state"][name]) for name, value in replicated(whole[0]).items())
    for result, exact in zip(half, whole, strict=True):
        masters = {name: value for name, value in result["state"].items() if name.endswith("|param")}
        assert all(torch.equal(value, exact["state"][name]) for name, value in masters.items())
    settings = two_ranks.run(train, [*low, "optimizer.weight_decay=0.5", "optimizer.beta1=0.5"], 2, 3, saved)[0][
        "groups"
    ]
    assert {(group["weight_decay"], group["betas"][0]) for group in settings} == {(0.5, 0.5), (0.0, 0.5)}


def replicated(result) -> dict[str, torch.Tensor]:
    return {name: value for name, value in result["state"].items() if "|" not in name}


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(DP2, marks=pytest.mark.slow),
        pytest.param(TP2, marks=pytest.mark.slow),
        PP2,
        pytest.param([*TP2, *LATENT], marks=pytest.mark.slow),
        pytest.param([*PP2, *LONGCAT], marks=pytest.mark.slow),
    ],
    ids=["DP 2", "TP 2", "PP 2", "TP 2, latent attention", "PP 2, LongCat-Flash"],
)
def test_a_resumed_run_is_bitwise_identical_to_an_uninterrupted_one(two_ranks, tmp_path, layout):
    overrides = [*BASE, *layout, "train.precision=bf16"]
    straight = two_ranks.run(train, overrides, 0, 4, "", str(tmp_path / "saved"), 2)
    resumed = two_ranks.run(train, overrides, 2, 4, str(tmp_path / "saved"))
    check_that_it_continued(straight, resumed, 2, ("losses", "norms"))


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(TP2, marks=pytest.mark.slow),
        INTERLEAVED,
        pytest.param(EP2, marks=pytest.mark.slow),
        [*TP2, *LATENT],
        pytest.param([*EP2, *LONGCAT], marks=pytest.mark.slow),
        pytest.param([*INTERLEAVED, *LONGCAT, "model.layers=8"], marks=pytest.mark.slow),
    ],
    ids=[
        "TP 2",
        "PP 2 interleaved",
        "EP 2",
        "TP 2, latent attention",
        "EP 2, LongCat-Flash",
        "PP 2 interleaved, LongCat-Flash",
    ],
)
def test_recomputation_changes_nothing(two_ranks, layout):
    overrides = [*BASE, "model.router.kind=top_p", *layout]
    expected = two_ranks.run(train, overrides, 0, 3)[0]
    for recompute in ("selective", "full"):
        again = two_ranks.run(train, [*overrides, f"train.recompute={recompute}"], 0, 3)[0]
        for figure in ("losses", "norms", "rows", "statistics"):
            assert again[figure] == expected[figure], (recompute, figure)
        assert again["attentions"] == 2 * expected["attentions"], "nothing was recomputed"


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(TP2, id="TP 2"),
        pytest.param(PP2, id="PP 2", marks=pytest.mark.slow),
        pytest.param(INTERLEAVED, id="PP 2 interleaved"),
        pytest.param(EP2, id="EP 2", marks=pytest.mark.slow),
    ],
)
def test_statistics_count_every_token_once(plain, one_rank, two_ranks, layout):
    """On every rank and for every layer; a statistics vector ends with the histogram of K and the loads."""
    (alone,) = one_rank.run(train, [*BASE, *ALONE], 0, 2)
    results = two_ranks.run(train, [*BASE, *layout], 0, 2)
    reference = maps_of_all_ranks([plain()])
    for layer, passes in maps_of_all_ranks(results).items():
        assert all(torch.equal(a, b) for a, b in zip(passes, reference[layer], strict=False))
    for result in results:
        assert result["rows"] == alone["rows"]
        assert list(result["rows"][0]) == [0, 1, 2, 3]
        for ours, whole in zip(result["statistics"], alone["statistics"], strict=True):
            for layer, vector in ours.items():
                counts = -(4 + 1 + 4)
                assert vector[counts:] == whole[layer][counts:]
                brute = sum(passes.sum().item() for passes in reference[layer][:4])
                assert result["rows"][0][layer] == brute


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=() if kind == "top_any improved" else pytest.mark.slow) for kind in sorted(BASELINES)],
)
def test_baseline_routers_train_like_one_rank(one_rank, two_ranks, kind):
    """Under tensor parallelism, with their state between steps and counts over ranks that share sequences."""
    overrides = [part for part in BASE if "z_loss" not in part] + [*BASELINES[kind], "optimizer.lr=1e-3"]
    (alone,) = one_rank.run(train, [*overrides, *ALONE], 0, 6)
    spread = two_ranks.run(train, [*overrides, *TP2], 0, 6)[0]
    assert spread["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    assert spread["norms"] == pytest.approx(alone["norms"], rel=1e-4)


@pytest.mark.parametrize(
    "extra", [["model.router.balance_scope=sequence"], ["model.tie_embeddings=true"], ["model.moe.shared_hidden=32"],
              ["model.moe.moe_layer_freq=2", "model.ffn_hidden=64"]], ids=lambda extra: extra[0],
)  # fmt: skip
@pytest.mark.parametrize("layout", [pytest.param(TP2, id="TP 2", marks=pytest.mark.slow), pytest.param(PP2, id="PP 2")])
def test_other_architectures_train_like_the_plain_model(plain, two_ranks, layout, extra):
    expected = plain(*extra, steps=5)
    spread = two_ranks.run(train, [*BASE, *layout, *extra], 0, 5)[0]
    assert spread["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert spread["norms"] == pytest.approx(expected["norms"], rel=1e-5)


def test_f18_capacity_drops_the_same_routes_in_a_pipeline(one_rank, two_ranks):
    overrides = [*BASE, "model.moe.capacity_factor=1.0"]
    (alone,) = one_rank.run(train, [*overrides, *ALONE], 0, 6)
    spread = two_ranks.run(train, [*overrides, *PP2], 0, 6)[0]
    assert spread["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    assert spread["rows"] == alone["rows"]
    selected = sum(passes.sum().item() for passes in maps_of_all_ranks([alone])[0][-4:])
    assert alone["rows"][-1][0] < selected, "nothing was dropped"


def test_a_stage_without_moe_layers_takes_part_in_all_decisions(one_rank, two_ranks):
    """Calibration, a budget over layers, adaptation, statistics: no collective hangs on the stage without them."""
    overrides = [
        "engine=megatron", "model.layers=2", "model.moe.moe_layer_freq=2", "model.ffn_hidden=64",
        "model.router.kind=top_any", "model.router.variant=improved", "model.router.initial_experts=1",
        "model.router.min_experts=0", "model.moe.active_at_start=2", "adaptation.interval=6", "adaptation.window=3",
        "adaptation.removal_share=0.5", "budget.method=pi", "budget.experts_per_token=1", "budget.scope=global",
    ]  # fmt: skip
    (alone,) = one_rank.run(train, [*overrides, *ALONE], 0, 13)
    results = two_ranks.run(train, [*overrides, *PP2], 0, 13)
    assert alone["events"]
    for result in results:
        assert result["events"] == alone["events"]
        assert result["losses"] == pytest.approx(alone["losses"], rel=1e-5)
        assert result["rows"] == alone["rows"]


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(EP2, id="EP 2", marks=pytest.mark.slow), pytest.param(PP2, id="PP 2"),
        pytest.param([*TP2, *LATENT], id="TP 2, latent attention", marks=pytest.mark.slow),
        pytest.param([*TP2, *LONGCAT], id="TP 2, LongCat-Flash", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_bf16_follows_fp32(two_ranks, layout):
    exact = two_ranks.run(train, [*BASE, *layout], 0, 6)[0]
    rounded = two_ranks.run(train, [*BASE, *layout, "train.precision=bf16"], 0, 6)[0]
    assert rounded["losses"] == pytest.approx(exact["losses"], rel=5e-3)
    assert rounded["losses"] != exact["losses"]


@pytest.mark.parametrize(
    ("layout", "model"), [(TP2, []), (PP2, []), (INTERLEAVED, []), (EP2, []), (PP2, LONGCAT)],
    ids=["TP 2", "PP 2", "PP 2 interleaved", "EP 2", "PP 2, LongCat-Flash"],
)  # fmt: skip
def test_evaluation_and_logits_equal_those_of_the_plain_model(one_rank, two_ranks, layout, model):
    overrides = [part for part in BASE if part != "engine=megatron"]
    (expected,) = one_rank.run(forward_only, [*overrides, *ALONE, *model])
    for result in two_ranks.run(forward_only, [*BASE, *layout, *model]):
        assert result["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        torch.testing.assert_close(result["logits"], expected["logits"], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["seq_top_k", "expert_race", "resonance", "da_moe"])
def test_evaluation_of_split_sequences_equals_that_of_whole_ones(one_rank, two_ranks, kind):
    overrides = [part for part in BASE if "router" not in part] + (BASELINES | ATTENTIVE)[kind]
    plain = [part for part in overrides if part != "engine=megatron"]
    (expected,) = one_rank.run(forward_only, [*plain, *ALONE])
    for result in two_ranks.run(forward_only, [*overrides, *TP2]):
        assert result["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        torch.testing.assert_close(result["logits"], expected["logits"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("layout", "rank"),
    [
        pytest.param(EP2, 1, id="EP 2", marks=pytest.mark.slow),
        pytest.param(PP2, 1, id="PP 2"),
        pytest.param(TP2, 0, id="TP 2"),
    ],
)
def test_nonfinite_scores_stop_every_rank_and_name_step_layer_and_rank(two_ranks, layout, rank):
    for message, untouched in two_ranks.run(train_into_nan, [*BASE, *layout], 3, rank):
        assert message.startswith(f"step 3: router scores are not finite in layer 3 on rank {rank}; "), message
        assert untouched


def test_a_checkpoint_of_another_model_is_refused_by_name(one_rank, tmp_path):
    saved = str(tmp_path / "saved")
    one_rank.run(train, [*BASE, *ALONE], 0, 1, "", saved)
    for change, said in (
        ("model.moe.expert_hidden=64", "has shape"), ("model.layers=2", "has tensors that this model lacks"),
        ("model.layers=8", "is missing"),
    ):  # fmt: skip
        (message,) = one_rank.run(refusal, [*BASE, *ALONE, change], saved)
        assert message.startswith("checkpoint"), message
        assert said in message


def test_an_embedding_that_cannot_be_sharded_is_refused():
    config = config_for("engine=megatron", "parallel.tensor=3", "model.hidden=48", "model.heads=3", "model.kv_heads=3",
                        "model.ffn_hidden=24")  # fmt: skip
    with pytest.raises(ConfigError, match=r"parallel.tensor=3: must divide the number of embedding rows \(64\)"):
        make_engine(config, 64)


def test_context_parallel_ranks_cover_every_position_once():
    from dynmoe.engines.megatron.groups import context_positions

    assert context_positions(8, 2, 0).tolist() == [0, 1, 2, 3]
    assert context_positions(8, 2, 1).tolist() == [4, 5, 6, 7]
    assert torch.cat([context_positions(24, 3, rank) for rank in range(3)]).tolist() == list(range(24))


def test_sharded_weights_have_megatrons_layout():
    """Two key-value heads with two query heads each, one row per head: q0 q1 k0 v0, q2 q3 k1 v1."""
    from dynmoe.engines.megatron.weights import _gate_and_up, _query_key_value

    model = config_for("model.hidden=32", "model.heads=4", "model.kv_heads=2").model
    plain = torch.arange(8).repeat_interleave(model.width_of_head)[:, None].float()  # q0 q1 q2 q3 k0 k1 v0 v1
    layout = _query_key_value(model)
    parts = layout.split(plain, 2)
    assert [part[:: model.width_of_head, 0].tolist() for part in parts] == [[0, 1, 4, 6], [2, 3, 5, 7]]
    assert torch.equal(layout.join(parts), plain)
    gate_up = torch.arange(8.0)[:, None]
    parts = _gate_and_up().split(gate_up, 2)
    assert [part[:, 0].tolist() for part in parts] == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert torch.equal(_gate_and_up().join(parts), gate_up)


def test_rows_that_are_rotated_together_are_neighbours_in_megatron():
    """In two heads of two rows that are not rotated and four that are: 2 and 4, 3 and 5; 8 and 10, 9 and 11."""
    from dynmoe.engines.megatron.weights import _interleaved, _shard

    latent = config_for(*LATENT).model.latent
    assert latent.qk_rope_head_dim == 4
    layout = _interleaved(latent, 2, _shard(0))
    plain = torch.arange(12.0)[:, None]
    parts = layout.split(plain, 2)
    assert [part[:, 0].tolist() for part in parts] == [[0, 1, 2, 4, 3, 5], [6, 7, 8, 10, 9, 11]]
    assert torch.equal(layout.join(parts), plain)


def test_every_router_kind_is_tested():
    from dynmoe import routers

    assert {name.split()[0] for name in [*ATTENTIVE, *BASELINES, *ROUTERS]} == set(routers.ROUTERS)
