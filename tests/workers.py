"""A pool of gloo ranks that lives for a test file; all pools share one import of torch and the engines."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import pickle
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import psutil

from harness.processes import free_port, start_server

_START_TIMEOUT_S = 120.0
# Threads of gloo wake up all the time, also for groups that no test uses any more; processes with more are replaced.
_MOST_THREADS = 120


def _serve(rank: int, world_size: int, port: int, connection: Connection) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port), OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="",
    )  # fmt: skip
    import torch

    for kind in (FutureWarning, DeprecationWarning):
        warnings.filterwarnings("error", category=kind, module="dynmoe")  # as in pyproject.toml
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    from dynmoe.engines import deepspeed

    deepspeed.DEEPSPEED_PERSISTENT = 100  # else ZeRO 3 would leave the small matrices of tests whole
    deepspeed.start_processes()
    _keep_groups_of_layouts()
    connection.send("ready")
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        function, arguments = task
        # A global of Megatron's, whose shape is that of whoever sets it first: a schedule, or a bare backward pass.
        MoEAuxLossAutoScaler.main_loss_backward_scale = None
        try:
            # By value: torch would send a file descriptor for each tensor.
            connection.send_bytes(pickle.dumps((True, function(*arguments))))
        except Exception:
            connection.send((False, traceback.format_exc()))


def _keep_groups_of_layouts() -> None:
    """Lets the process groups of each of Megatron's layouts serve all engines of it.

    Megatron keeps them in globals of one module, for one layout at a time. Groups that are made anew for every engine
    stay behind with their threads, and thousands of those cost more than the tests.
    """
    from megatron.core import parallel_state

    from dynmoe.engines.megatron import engine, groups

    def state() -> dict[str, Any]:
        return {name: value for name, value in vars(parallel_state).items() if name.strip("_").isupper()
                or name == "_global_process_group_list"}  # fmt: skip

    none, make, known = state(), groups.make_groups, dict[tuple[int, ...], dict[str, Any]]()

    def make_groups(parallel: Any, seed: int) -> None:
        layout = dataclasses.astuple(parallel)
        vars(parallel_state).update(none | known.get(layout, {}))
        make(parallel, seed)
        known[layout] = state()

    groups.make_groups = engine.make_groups = make_groups


class WorkerPool:
    """``world_size`` processes in one gloo group; forked at the first call, and after a failure or many groups."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._processes: list[Any] = []
        self._connections: list[Connection] = []

    def _start(self) -> None:
        start_server()
        context, port = multiprocessing.get_context("forkserver"), free_port()
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.world_size, port, theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)
        for connection in self._connections:
            if not connection.poll(_START_TIMEOUT_S) or connection.recv() != "ready":
                self.stop()
                raise TimeoutError(f"{self.world_size} ranks did not start within {_START_TIMEOUT_S} s")

    def run(self, function: Callable[..., Any], *arguments: Any, timeout_s: float = 120.0) -> list[Any]:
        """Calls ``function(*arguments)`` on every rank and returns what each returned.

        Raises:
            AssertionError: with the traceback of the first rank that failed; TimeoutError where none answered.
        """
        if not self._processes:
            self._start()
        for connection in self._connections:
            connection.send((function, arguments))
        results, failure = [], None
        for rank, connection in enumerate(self._connections):
            # After a failure the other ranks may wait in a collective forever.
            if not connection.poll(timeout_s if failure is None else 1.0):
                failure = failure or f"rank {rank} did not answer within {timeout_s} s"
                continue
            sound, result = connection.recv()
            results.append(result)
            if not sound:
                failure = f"rank {rank}:\n{result}"
        if failure is not None:
            self.stop()
            raise AssertionError(failure)
        if any(psutil.Process(process.pid).num_threads() > _MOST_THREADS for process in self._processes):
            self.stop()
        return results

    def stop(self) -> None:
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._connections = [], []
