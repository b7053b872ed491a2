"""Starts the ranks of a layout without their GPUs, and measures the memory that each takes."""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection

from dynmoe.engines import engine_class
from dynmoe.errors import UserError, first_line
from dynmoe.plan.layout import Layout


def dry_start(layout: Layout, ranks: Sequence[int]) -> Iterator[int]:
    """Bytes of all tensors of each of these ranks after the start of its engine, in the order of the ranks.

    Each rank is a process of its own, as many at a time as there are cores. Nothing is computed or sent.

    Raises:
        UserError: a rank did not start.
    """
    # Read when an engine is imported: ranks start on the CPU, also where GPUs are.
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    # Imported once, and not in each process; the second one needs torch's testing package.
    engine_class(layout.config)
    importlib.import_module("dynmoe.engines.dry_start")
    gc.freeze()  # else each process would search all that exists already, which takes longer than the start
    try:
        yield from _in_processes(layout, ranks)
    finally:
        gc.unfreeze()


def _in_processes(layout: Layout, ranks: Sequence[int]) -> Iterator[int]:
    context = multiprocessing.get_context("fork")
    at_a_time = len(os.sched_getaffinity(0))
    for first in range(0, len(ranks), at_a_time):
        started = []
        for rank in ranks[first : first + at_a_time]:
            result, own = context.Pipe(duplex=False)
            process = context.Process(target=_start, args=(layout, rank, own))
            process.start()
            own.close()
            started.append((rank, process, result))
        for rank, process, result in started:
            found = _received(result)
            process.join()
            if isinstance(found, str):
                raise UserError(f"rank {rank} of {layout.world_size} does not start: {found}")
            yield found


def _received(result: Connection) -> int | str:
    try:
        return result.recv()
    except EOFError:
        return "its process ended without a result; is there enough memory?"


def _start(layout: Layout, rank: int, result: Connection) -> None:
    """Sends the bytes of one rank, or why it did not start."""
    from dynmoe.engines.dry_start import bytes_at_start

    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)  # DeepSpeed prints on rank 0
    os.dup2(silent, 2)
    try:
        found = bytes_at_start(layout.config, layout.vocab_size, rank, layout.world_size, layout.ranks_per_node)
        result.send(found)
    except Exception as error:
        result.send(f"{type(error).__name__}: {first_line(error)}" if not isinstance(error, UserError) else str(error))
