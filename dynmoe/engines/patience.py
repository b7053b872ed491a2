"""Timeouts of process groups, made so long that only the watchdog (``guard.hang_timeout_s``) ends a hang."""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist

# PyTorch's timeouts count time in which a process is stopped, and NCCL's kill a rank before it can report where it
# waits. This is the longest possible timeout, as PyTorch's stores keep milliseconds in 32 bits.
PATIENCE = timedelta(days=24)


def be_patient() -> None:
    """Sets this timeout for all process groups of this rank, including those created by an engine's package."""
    for group in list(dist.distributed_c10d._world.pg_map):
        if hasattr(dist, "set_timeout"):  # public from torch 2.14 on
            dist.set_timeout(PATIENCE, group)
        else:
            dist.distributed_c10d._set_pg_timeout(PATIENCE, group)
