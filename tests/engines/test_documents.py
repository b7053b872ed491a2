"""Documents do not see each other, in any layout of both engines."""

from __future__ import annotations

import pytest

from tests.engines.document_cases import influences, train_packed, train_packed_plainly
from tests.engines.test_layouts import HALF, MEGATRON, WHOLE
from tests.moe.cases import LATENT, ROUTERS, no_losses

TOP_P = [*ROUTERS["top_p"], *no_losses("top_p"), "model.layers=4", "model.kv_heads=2", "data.documents=masked"]
PREDICTED = ["data.predict_first_token=false"]  # the number of labels that count differs
RECOMPUTE = ["train.recompute=full"]
LAYOUTS = {
    "DeepSpeed": (1, WHOLE),
    "DeepSpeed, selective": (1, [*WHOLE, "train.recompute=selective"]),
    "DeepSpeed EP 2, full": (2, [*HALF, "parallel.expert=2", *RECOMPUTE]),
    "Megatron, selective": (1, [MEGATRON, *WHOLE, "train.recompute=selective"]),
    "Megatron TP 2": (2, [MEGATRON, *WHOLE, "parallel.tensor=2"]),
    "Megatron TP 2, full": (2, [MEGATRON, *WHOLE, "parallel.tensor=2", *RECOMPUTE]),
    "Megatron PP 2": (2, [MEGATRON, *WHOLE, "parallel.pipeline=2"]),
    "Megatron PP 2 interleaved, full": (
        2, [MEGATRON, *WHOLE, "parallel.pipeline=2", "parallel.virtual_pipeline=2", *RECOMPUTE],
    ),
    "Megatron PP 2 x EP 2, full": (4, [MEGATRON, *HALF, "parallel.pipeline=2", "parallel.expert=2", *RECOMPUTE]),
    "Megatron TP 2 x EP 2": (4, [MEGATRON, *HALF, "parallel.tensor=2", "parallel.expert=2"]),
    "Megatron CP 2, selective": (2, [MEGATRON, *WHOLE, "parallel.context=2", "train.recompute=selective"]),
    "Megatron CP 2 x PP 2, full": (
        4, [MEGATRON, *WHOLE, "parallel.context=2", "parallel.pipeline=2", *RECOMPUTE],
    ),
    "Megatron CP 2 x TP 2": (
        4, [MEGATRON, *WHOLE, "parallel.context=2", "parallel.tensor=2", "model.heads=4"],
    ),
}  # fmt: skip


@pytest.fixture
def pools(one_rank, two_ranks, four_ranks):
    return {1: one_rank, 2: two_ranks, 4: four_ranks}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_document_changes_no_loss_gradient_or_routing_of_another(pools, layout):
    ranks, overrides = LAYOUTS[layout]
    masked = pools[ranks].run(influences, [*TOP_P, *PREDICTED, *overrides], True)
    for name in ("loss", "gradient", "routing"):
        assert max(found[name] for found in masked) < 1e-6, name


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(name, marks=() if ranks == 1 or name == "Megatron CP 2, selective" else pytest.mark.slow)
        for name, (ranks, _) in LAYOUTS.items()
    ],
)
def test_without_the_mask_the_test_finds_leaks(pools, layout):
    ranks, overrides = LAYOUTS[layout]
    joined = pools[ranks].run(influences, [*TOP_P, *PREDICTED, *overrides], False)
    for name, smallest in {"loss": 1e-3, "gradient": 1e-4, "routing": 0.02}.items():
        assert max(found[name] for found in joined) > smallest, name


ATTENTION = {"heads": [], "latent": LATENT}
# The attention with which a layout is fast; with the other one it is slow.
FAST = {
    "DeepSpeed EP 2, full": "latent",
    "Megatron TP 2": "latent",
    "Megatron PP 2 interleaved, full": "heads",
    "Megatron CP 2, selective": "heads",
}


@pytest.mark.parametrize(
    ("layout", "kind"),
    [
        pytest.param(layout, kind, marks=() if kind == fast else pytest.mark.slow)
        for layout, fast in FAST.items()
        for kind in ATTENTION
    ],
)
def test_a_loss_without_some_labels_is_the_mean_over_the_others(pools, layout, kind):
    attention = ATTENTION[kind]
    ranks, overrides = LAYOUTS[layout]
    expected = train_packed_plainly([*TOP_P, *attention], 6)
    for found in pools[ranks].run(train_packed, [*TOP_P, *attention, *overrides], 6):
        assert found == pytest.approx(expected, rel=1e-5)
