"""A checkpoint holds what each router carries from step to step: a resumed run continues bitwise."""

from __future__ import annotations

import pytest

from tests.engines.cases import train
from tests.engines.comparisons import check_that_it_continued
from tests.moe.cases import ATTENTIVE, BASELINES, ROUTERS

KINDS = ROUTERS | BASELINES | ATTENTIVE
LAYOUTS = {
    "DeepSpeed EP 2": ["parallel.expert=2"],
    "Megatron PP 2": ["engine=megatron", "parallel.pipeline=2"],
}
# Statistics of scores, coefficients, biases and running thresholds.
FAST = {
    ("DeepSpeed EP 2", "expert_threshold"),
    ("DeepSpeed EP 2", "relu"),
    ("Megatron PP 2", "identity_experts"),
    ("Megatron PP 2", "quantile running"),
}


@pytest.mark.parametrize(
    ("layout", "kind"),
    [
        pytest.param(layout, kind, marks=() if (layout, kind) in FAST else pytest.mark.slow)
        for layout in LAYOUTS
        for kind in KINDS
    ],
)
def test_a_resumed_run_is_bitwise_identical_to_an_uninterrupted_one(two_ranks, tmp_path, layout, kind):
    overrides = [*KINDS[kind], *LAYOUTS[layout], "train.micro_batch=2"]
    straight = two_ranks.run(train, overrides, 0, 8, "", str(tmp_path / "saved"), 4)
    resumed = two_ranks.run(train, overrides, 4, 8, str(tmp_path / "saved"))
    check_that_it_continued(straight, resumed, 4, ("losses", "norms", "rows", "statistics"))
