"""A trace says of each token what its layer did with it, whatever rank computed it."""

from __future__ import annotations

import pandas as pd
import pytest

from tests.engines.cases import GLOBAL_BATCH, LENGTH, batch_of_step
from tests.engines.routing_cases import train_and_keep

STEPS = 1  # from the same weights: later ones depend on the accumulation, by the balance over passes so far
MEGATRON = "engine=megatron"
PLACE = ["layer", "sample", "position"]
WHOLE = ["model.router.kind=top_p", "train.micro_batch=8", "model.kv_heads=2", "model.layers=4"]
LAYOUTS = {
    "DeepSpeed EP 2, accumulation 2": ["train.micro_batch=2", "parallel.expert=2"],
    "Megatron PP 2, recomputed": [MEGATRON, "train.micro_batch=2", "parallel.pipeline=2", "train.recompute=full"],
    "Megatron TP 2": [MEGATRON, "train.micro_batch=4", "parallel.tensor=2"],
    "Megatron EP 2": [MEGATRON, "train.micro_batch=4", "parallel.expert=2"],
}


def read(folder) -> pd.DataFrame:
    return pd.read_parquet(folder).sort_values(PLACE, ignore_index=True)


@pytest.fixture(scope="module")
def of_one_rank(one_rank, tmp_path_factory):
    folder = tmp_path_factory.mktemp("traces")
    one_rank.run(train_and_keep, WHOLE, STEPS, str(folder))
    return read(folder)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_trace_is_the_same_in_every_layout(two_ranks, of_one_rank, tmp_path, layout):
    two_ranks.run(train_and_keep, [*WHOLE, *LAYOUTS[layout]], STEPS, str(tmp_path))
    trace = read(tmp_path)
    assert len(list(tmp_path.rglob("*.parquet"))) == 2
    for column in ("step", *PLACE, "token"):
        assert (trace[column] == of_one_rank[column]).all(), column
    assert trace["experts"].map(list).tolist() == of_one_rank["experts"].map(list).tolist()
    for own, other in zip(trace["gates"], of_one_rank["gates"], strict=True):
        assert own == pytest.approx(other, abs=1e-5)


def test_each_row_is_its_token_with_what_the_layer_was_given(two_ranks, tmp_path):
    """Here capacity drops routes."""
    overrides = ["model.router.kind=top_p", "model.moe.capacity_factor=0.8", "train.micro_batch=2"]
    results = two_ranks.run(train_and_keep, overrides, STEPS, str(tmp_path))
    trace, tokens = read(tmp_path), batch_of_step(STEPS)
    assert len(trace) == 2 * GLOBAL_BATCH * LENGTH
    dropped = 0
    for row in trace.itertuples():
        assert (row.step, row.token) == (STEPS, tokens[row.sample, row.position])
        # Samples go round: two of the first rank, two of the second, and again for the second micro-batch.
        rank, micro_batch = row.sample // 2 % 2, row.sample // 4
        plan, place = results[rank]["plans"][row.layer, micro_batch], row.sample % 2 * LENGTH + row.position
        routed, selected = plan["routed"][place], plan["selected"][place]
        assert list(row.experts) == [e for e, on in enumerate(routed) if on]
        assert list(row.gates) == [plan["gates"][place][e] for e in row.experts]
        assert list(row.dropped) == [e for e, on in enumerate(selected) if on and not routed[e]]
        dropped += len(row.dropped)
    assert dropped > 0
