"""Muon where ranks hold parts of matrices: stages, replicas, resumption, other layouts."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.distributed as dist

from dynmoe.engines.whole_matrices import MatrixExchange, Part, Place, Unit, held_by_unit
from tests.engines.cases import train, train_plainly
from tests.engines.comparisons import check_that_it_continued, read_canonical

MUON = ["optimizer.kind=muon", "model.kv_heads=2", "model.moe.shared_hidden=16", "model.moe.moe_layer_freq=2"]
ONE = ["train.micro_batch=8"]
HALF = ["train.micro_batch=4"]
QUARTER = ["train.micro_batch=2"]


@pytest.fixture(scope="module")
def plain(one_rank):
    """Twelve steps of the loop over single matrices."""

    @functools.cache
    def run():
        return one_rank.run(train_plainly, [*MUON, *ONE], 12)[0]["losses"]

    return run


@pytest.mark.parametrize("stage", [0, pytest.param(1, marks=pytest.mark.slow), 2])
def test_zero_stages_train_like_single_matrices_and_resume_bitwise(plain, four_ranks, tmp_path, stage):
    """Four ranks, with two replicas of each expert."""
    overrides = [*MUON, *QUARTER, "parallel.expert=2", f"deepspeed.zero_stage={stage}"]
    straight = four_ranks.run(train, overrides, 0, 12, "", str(tmp_path / "saved"), 6)
    assert straight[0]["losses"] == pytest.approx(plain(), rel=1e-5)
    assert plain()[-1] < plain()[0] - 0.3, "the model learned nothing: the comparison is weak"
    resumed = four_ranks.run(train, overrides, 6, 12, str(tmp_path / "saved"))
    check_that_it_continued(straight, resumed, 6, ("losses",))


@pytest.mark.parametrize("overrides", [
    "deepspeed.zero_stage=2", "engine=megatron parallel.tensor=2",
    *(pytest.param(own, marks=pytest.mark.slow) for own in (
        "deepspeed.zero_stage=0", "deepspeed.zero_stage=1", "engine=megatron",
    )),
])  # fmt: skip
def test_bf16_trains_like_fp32(plain, two_ranks, overrides):
    batch = ONE if "parallel.tensor=2" in overrides else HALF
    losses = two_ranks.run(train, [*MUON, *overrides.split(), *batch, "train.precision=bf16"], 0, 12)[0]["losses"]
    assert losses == pytest.approx(plain(), rel=2e-2)
    assert losses != pytest.approx(plain(), rel=1e-5), "this is not bf16"


def test_a_megatron_run_resumes_bitwise(four_ranks, tmp_path):
    overrides = [*MUON, "engine=megatron", *HALF, "parallel.tensor=2", "parallel.expert=2"]
    straight = four_ranks.run(train, overrides, 0, 6, "", str(tmp_path / "saved"), 3)
    resumed = four_ranks.run(train, overrides, 3, 6, str(tmp_path / "saved"))
    check_that_it_continued(straight, resumed, 3, ("losses",))


@pytest.mark.parametrize(("before", "after"), [
    ([*QUARTER, "parallel.expert=2", "deepspeed.zero_stage=2"], [*ONE, "deepspeed.zero_stage=1"]),
    (["engine=megatron", *HALF, "parallel.tensor=2", "parallel.expert=2"], ["engine=megatron", *ONE]),
], ids=["DeepSpeed", "Megatron"])  # fmt: skip
def test_a_checkpoint_fits_another_layout(plain, one_rank, four_ranks, tmp_path, before, after):
    saved = str(tmp_path / "saved")
    first = four_ranks.run(train, [*MUON, *before], 0, 6, "", saved)[0]["losses"]
    (rest,) = one_rank.run(train, [*MUON, *after], 6, 12, saved)
    assert first + rest["losses"] == pytest.approx(plain(), rel=1e-5)


def test_checkpoints_have_no_second_moment_of_matrices(two_ranks, tmp_path):
    two_ranks.run(train, [*MUON, *HALF, "parallel.expert=2"], 0, 2, "", str(tmp_path / "saved"))
    names = set(read_canonical(tmp_path / "saved"))
    for name in ("layers.0.moe.experts.w_up_EHD.3", "layers.1.ffn.w_down_DF", "layers.0.attention.w_qkv"):
        assert {f"{name}|param", f"{name}|exp_avg"} <= names
        assert f"{name}|exp_avg_sq" not in names
    for name in ("w_embed_VD", "w_out_VD", "norm.weight", "layers.0.moe.router.weight_ED"):
        assert f"{name}|exp_avg_sq" in names, sorted(names)


def test_an_expert_without_gradient_stands_still():
    unit = Unit.unsharded((4, 6), (4,))
    held = held_by_unit(0, unit.size, 0, 0, 2 * unit.size, Place(0, 0))
    exchange = MatrixExchange([unit] * 2, held, None, torch.float32, torch.device("cpu"))
    gradient = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
    momentum = gradient.clone()
    gradient[1] = 0
    exchange([momentum], [gradient])
    assert not momentum[1].any()
    assert momentum[0].norm() == pytest.approx(0.2 * 6**0.5 * 2, rel=0.2)


def test_parts_end_where_units_end():
    """Elements 5 to 25 of a stack whose units have 8 elements, from place 100 of the third tensor on."""
    assert list(held_by_unit(10, 8, 1, 5, 20, Place(2, 100))) == [
        (Part(10, 1, 5, 3), Place(2, 100)),
        (Part(11, 1, 0, 8), Place(2, 103)),
        (Part(12, 1, 0, 8), Place(2, 111)),
        (Part(13, 1, 0, 1), Place(2, 119)),
    ]


def owners_of_stack() -> list[int]:
    """Number of elements that this rank orthogonalizes, of eight small matrices and a large one."""
    units = [Unit.unsharded((4, 4), (4,))] * 8 + [Unit.unsharded((4, 32), (4,))]
    held = [(Part(number, 0, 0, unit.size), Place(number, 0)) for number, unit in enumerate(units)]
    exchange = MatrixExchange(units, held, dist.group.WORLD, torch.float32, torch.device("cpu"))
    seen = []
    wrapped = exchange._orthogonalized
    exchange._orthogonalized = lambda owned: seen.extend(owned) or wrapped(owned)
    momenta = [torch.randn(unit.shape, generator=torch.Generator().manual_seed(n)) for n, unit in enumerate(units)]
    before = [momentum.clone() for momentum in momenta]
    exchange(momenta, before)
    assert not any(torch.allclose(*pair) for pair in zip(momenta, before, strict=True))
    return sorted(part.unit for part in seen)


def test_ranks_share_the_work(two_ranks):
    assert two_ranks.run(owners_of_stack) == [[8], list(range(8))]
