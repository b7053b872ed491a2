"""Starts ranks of a layout without their GPUs, in a process in which no engine has been started before."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from multiprocessing.connection import Connection

from dynmoe.plan.dry_start import dry_start
from dynmoe.plan.layout import Layout
from harness.processes import start_server

_TIME_S = 3600.0


def bytes_of_ranks(layout: Layout, ranks: Sequence[int]) -> list[int]:
    """Bytes of the tensors of each rank after its start."""
    start_server()  # which has imported the engines, and started none
    context = multiprocessing.get_context("forkserver")
    received, sent = context.Pipe(duplex=False)
    process = context.Process(target=_start, args=(layout, ranks, sent))
    process.start()
    sent.close()
    assert received.poll(_TIME_S)
    found: list[int] = received.recv()
    process.join()
    return found


def _start(layout: Layout, ranks: Sequence[int], result: Connection) -> None:
    result.send(list(dry_start(layout, ranks)))
