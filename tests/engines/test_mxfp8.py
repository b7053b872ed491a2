"""Experts with MXFP8 operands, emulated: layouts, engines, recomputation, resuming, and the refusal without the card.

Blocks of 32 along the widths belong to one row or weight, whatever the layout. Those of the gradients of weights join
rows of an expert on a rank, so layouts differ in which rows share a scale. As scales are powers of two, this changes
only elements below 2^-14 of the largest of their block. But rounding of fp32, in which layouts always differ, moves
some elements to the next number of E4M3, and 20 steps amplify that.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from dynmoe.engines import make_engine
from dynmoe.errors import ConfigError
from tests.engines.cases import config_for, train
from tests.engines.comparisons import check_that_it_continued
from tests.moe.cases import ROUTERS

STEPS = 20
COMMON = ["train.moe_backend=mxfp8_emulated", "model.kv_heads=2", *ROUTERS["top_p"], "model.router.z_loss=1e-3"]
WHOLE = ["train.micro_batch=2"]
HALF = ["train.micro_batch=1"]
MEGATRON = "engine=megatron"
LAYOUTS = {
    "DeepSpeed DP 2": (2, HALF),
    "DeepSpeed EP 2": (2, [*HALF, "parallel.expert=2"]),
    "DeepSpeed EP 2, ZeRO 3": (2, [*HALF, "parallel.expert=2", "deepspeed.zero_stage=3"]),
    "Megatron EP 2": (2, [MEGATRON, *HALF, "parallel.expert=2"]),
    "Megatron TP 2": (2, [MEGATRON, *WHOLE, "parallel.tensor=2"]),
    "Megatron TP 2 x EP 2": (4, [MEGATRON, *HALF, "parallel.tensor=2", "parallel.expert=2"]),
    "Megatron PP 2": (2, [MEGATRON, *WHOLE, "parallel.pipeline=2"]),
    "Megatron CP 2": (2, [MEGATRON, *WHOLE, "parallel.context=2"]),
}
FAST = ("DeepSpeed EP 2", "Megatron TP 2")


@pytest.fixture(scope="module")
def alone(one_rank):
    return one_rank.run(train, [*COMMON, *WHOLE], 0, STEPS)[0]


@pytest.fixture(scope="module")
def exact(one_rank):
    return one_rank.run(train, [*COMMON, "train.moe_backend=auto", *WHOLE], 0, STEPS)[0]


def relative(ours: list[float], theirs: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in LAYOUTS])
def test_layouts_train_like_one_process(alone, exact, two_ranks, four_ranks, name, summary):
    ranks, overrides = LAYOUTS[name]
    (ours, *_) = {2: two_ranks, 4: four_ranks}[ranks].run(train, [*COMMON, *overrides], 0, STEPS)
    first = relative(ours["losses"][:1], alone["losses"][:1])
    norm = relative(ours["norms"][:1], alone["norms"][:1])
    losses = relative(ours["losses"], alone["losses"])
    rounding = relative(exact["losses"], alone["losses"])
    summary.append(
        f"MXFP8, {name}: first loss {first:.0e}, its gradient norm {norm:.0e}, 20 losses {losses:.0e} "
        f"(fp32 instead: {rounding:.0e})"
    )
    assert alone["losses"][-1] < alone["losses"][0] - 0.3, "the model learned nothing: the comparison is weak"
    assert rounding > 1e-3, "MXFP8 changed nothing: the comparison is weak"
    assert first <= 1e-6
    assert norm <= 1e-5
    assert losses <= 3e-3


@pytest.mark.parametrize(
    "overrides", [[*HALF, "parallel.expert=2"], [MEGATRON, *WHOLE, "parallel.tensor=2"]], ids=["DeepSpeed", "Megatron"]
)
@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_a_run_resumes_and_recomputes_bitwise(two_ranks, tmp_path, overrides, precision):
    overrides = [*COMMON, *overrides, f"train.precision={precision}"]
    straight = two_ranks.run(train, overrides, 0, 6)
    two_ranks.run(train, [*overrides, "train.recompute=full"], 0, 3, "", str(tmp_path / "saved"))
    resumed = two_ranks.run(train, overrides, 3, 6, str(tmp_path / "saved"))
    check_that_it_continued(straight, resumed, 3, ("losses", "norms"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="refused elsewhere on a GPU")
@pytest.mark.parametrize("engine", ["deepspeed", "megatron"])
def test_without_the_card_it_is_refused_before_ranks_connect(engine):
    config = config_for("train.moe_backend=mxfp8", "train.precision=bf16", f"engine={engine}")
    with pytest.raises(ConfigError, match=r"train\.moe_backend='mxfp8': does not run on cpu; use auto, or mxfp8_emul"):
        make_engine(config, 64)
    assert not dist.is_initialized()
