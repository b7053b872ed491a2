"""Layers that predict further tokens in the engines; ``test_layouts.py`` compares layouts with the plain model."""

from __future__ import annotations

from importlib import metadata

import pytest
import torch
from packaging.version import Version

from tests.engines.cases import train
from tests.engines.comparisons import check_that_it_continued
from tests.engines.document_cases import influences, train_packed, train_packed_plainly
from tests.engines.multi_token_cases import with_megatrons_own
from tests.engines.test_documents import LAYOUTS as DOCUMENT_LAYOUTS
from tests.engines.test_documents import PREDICTED, TOP_P
from tests.engines.test_layouts import COMMON, HALF, LAYOUTS, WHOLE
from tests.moe.cases import BASELINES, ROUTERS

DENSE = ["model.moe.experts=0", "model.ffn_hidden=64", "model.mtp.layers=2", "model.mtp.loss_weight=0.4"]
ONE_FURTHER = [*COMMON, *ROUTERS["top_p"], "model.mtp.layers=1"]
BF16 = ["train.precision=bf16"]
SPREAD = {
    "DeepSpeed EP 2, ZeRO 2": (2, [*HALF, "parallel.expert=2", "deepspeed.zero_stage=2"]),
    "DeepSpeed EP 2, ZeRO 3": (2, [*HALF, "parallel.expert=2", "deepspeed.zero_stage=3"]),
    **{name: LAYOUTS[name] for name in ("Megatron TP 2", "Megatron PP 2", "Megatron PP 2 x EP 2")},
}


@pytest.fixture
def pools(one_rank, two_ranks, four_ranks):
    return {1: one_rank, 2: two_ranks, 4: four_ranks}


@pytest.mark.skipif(
    Version(metadata.version("megatron-core")) >= Version("0.18"),
    reason="ours is a HybridModel there, which is another",
)
@pytest.mark.parametrize("extra", [[], ["model.tie_embeddings=true", "model.window=5"]], ids=["untied", "tied"])
def test_losses_and_gradients_are_those_of_megatrons_own_module(one_rank, extra):
    ((ours, theirs),) = one_rank.run(with_megatrons_own, [*DENSE, *extra])
    assert ours.keys() == theirs.keys()
    assert sum(name.startswith("prediction.") for name in ours) == 20
    for name, value in theirs.items():
        assert value.abs().max() > 0, name
        torch.testing.assert_close(
            ours[name], value, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


FAST = ("DeepSpeed EP 2, ZeRO 3", "Megatron PP 2")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in SPREAD]
)
def test_a_resumed_run_is_bitwise_identical_to_an_uninterrupted_one(pools, tmp_path, name):
    ranks, layout = SPREAD[name]
    overrides = [*ONE_FURTHER, *layout, *BF16]
    straight = pools[ranks].run(train, overrides, 0, 4, "", str(tmp_path / "saved"), 2)
    resumed = pools[ranks].run(train, overrides, 2, 4, str(tmp_path / "saved"))
    check_that_it_continued(straight, resumed, 2, ("losses", "further", "norms"))


@pytest.mark.parametrize(
    "name", [pytest.param("DeepSpeed EP 2, ZeRO 3", marks=pytest.mark.slow), "Megatron PP 2 x EP 2"]
)
def test_recomputation_changes_nothing(pools, name):
    ranks, layout = SPREAD[name]
    overrides = [*ONE_FURTHER, *layout]
    expected = pools[ranks].run(train, overrides, 0, 3)[-1]  # a rank of the last stage
    for recompute in ("selective", "full"):
        again = pools[ranks].run(train, [*overrides, f"train.recompute={recompute}"], 0, 3)[-1]
        for figure in ("losses", "further", "norms", "rows", "statistics"):
            assert again[figure] == expected[figure], (recompute, figure)
        assert again["attentions"] == 2 * expected["attentions"], "nothing was recomputed"


@pytest.mark.parametrize(
    "router",
    [
        pytest.param(["budget.method=pi", "budget.experts_per_token=1.75"], id="pi"),
        pytest.param(BASELINES["quantile"], id="quantile", marks=pytest.mark.slow),
    ],
)
def test_budgets_hold_over_all_layers_in_any_layout(pools, router):
    overrides = [*ONE_FURTHER, *router]
    (alone,) = pools[1].run(train, [*overrides, *WHOLE], 0, 6)
    ranks, layout = SPREAD["Megatron PP 2 x EP 2"]
    spread = pools[ranks].run(train, [*overrides, *layout], 0, 6)[0]
    assert list(spread["rows"][0]) == [0, 1, 2, 3, 4]
    assert spread["rows"] == alone["rows"]
    assert spread["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    assert spread["further"] == pytest.approx(alone["further"], rel=1e-5)


TWO_FURTHER = [*TOP_P, "model.mtp.layers=2"]
DOCUMENTS = [
    "DeepSpeed EP 2, full", pytest.param("Megatron TP 2", marks=pytest.mark.slow),
    pytest.param("Megatron CP 2 x PP 2, full", marks=pytest.mark.slow),
]  # fmt: skip


@pytest.mark.parametrize("layout", DOCUMENTS)
def test_a_document_changes_no_loss_gradient_or_routing_of_another(pools, layout):
    ranks, overrides = DOCUMENT_LAYOUTS[layout]
    masked = pools[ranks].run(influences, [*TWO_FURTHER, *PREDICTED, *overrides], True)
    assert all(found[name] < 1e-6 for found in masked for name in found), masked
    joined = pools[ranks].run(influences, [*TWO_FURTHER, *PREDICTED, *overrides], False)
    assert max(found["gradient"] for found in joined) > 1e-4, "without the mask the test finds no leak"


@pytest.mark.parametrize("layout", DOCUMENTS)
def test_a_loss_without_some_labels_is_the_mean_over_the_others(pools, layout):
    ranks, overrides = DOCUMENT_LAYOUTS[layout]
    expected = train_packed_plainly(TWO_FURTHER, 6)
    for found in pools[ranks].run(train_packed, [*TWO_FURTHER, *overrides], 6):
        assert found == pytest.approx(expected, rel=1e-5)
