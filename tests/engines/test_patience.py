"""The timeout of every process group is longer than the watchdog's."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from dynmoe.engines import make_engine
from tests.engines.cases import VOCAB, config_for

ENGINES = {
    "deepspeed": ["parallel.expert=2", "train.micro_batch=2"],
    "megatron": ["engine=megatron", "parallel.pipeline=2"],
}


def shortest_timeout(overrides: list[str]) -> timedelta:
    """Shortest timeout of all process groups of this rank, after its engine is built."""
    make_engine(config_for(*overrides), VOCAB)
    groups = [group for group in dist.distributed_c10d._world.pg_map if dist.get_rank(group) >= 0]
    assert len(groups) > 2
    return min(group._get_backend(torch.device("cpu")).options._timeout for group in groups)


@pytest.mark.parametrize("engine", ENGINES)
def test_no_process_group_times_out_before_the_watchdog(two_ranks, engine):
    """PyTorch's defaults are 10 and 30 minutes, and include the time in which a rank was suspended."""
    assert two_ranks.run(shortest_timeout, ENGINES[engine]) == [timedelta(days=24)] * 2
