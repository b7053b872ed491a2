"""How long process groups wait: the watchdog alone decides that (``guard.hang_timeout_s``)."""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist

# Timeouts of PyTorch count the time in which a process was stopped, and those of NCCL end a rank before it has said
# where it waits. This is the longest that fits: PyTorch's stores keep milliseconds in 32 bits.
PATIENCE = timedelta(days=24)


def be_patient() -> None:
    """Lets every process group of this rank wait so long, those too that an engine's package made in its own way."""
    for group in list(dist.distributed_c10d._world.pg_map):
        if hasattr(dist, "set_timeout"):  # public from torch 2.14 on
            dist.set_timeout(PATIENCE, group)
        else:
            dist.distributed_c10d._set_pg_timeout(PATIENCE, group)
