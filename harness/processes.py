"""Training runs in separate processes, to be disturbed from outside: under torchrun, or forked from a warm process.

Importing torch, DeepSpeed and Megatron takes a rank seconds, far longer than a tiny run. A warm run is forked from a
server that has imported them, with the same ``train.py``, launcher variables and processes.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.forkserver import ensure_running
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Makes a process run on the CPU on any machine, with arithmetic that does not depend on the number of cores.
CPU = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
_WARM = [
    "train", "dynmoe.engines.deepspeed", "dynmoe.engines.megatron.engine", "dynmoe.train.summary",
    "dynmoe.train.views", "dynmoe.report.pictures",
    "pandas",  # PyArrow imports it, where it is installed, to write a trace
    "harness.frozen",  # last
]  # fmt: skip
_TIME_TO_SAVE_S = 10.0
_RANDOM = random.SystemRandom()  # tests seed the other one alike

Prepare = Callable[[int], None]  # called with the rank in every rank, before train.py


class Training:
    """A launcher and its ranks.

    Args:
        pid: process id of the launcher.
        output: file that all of them write to.
    """

    def __init__(self, pid: int, output: Path) -> None:
        self.pid = pid
        self._output = output

    def poll(self) -> int | None:
        """Exit status of the launcher, negative for a signal; None while it runs."""
        raise NotImplementedError

    def wait(self, timeout_s: float = 120.0) -> int:
        deadline = time.monotonic() + timeout_s
        while (status := self.poll()) is None:
            if time.monotonic() > deadline:
                self.kill_tree()
                raise AssertionError(f"did not end within {timeout_s} s: {self.output()}")
            time.sleep(0.01)
        return status

    def ranks(self) -> list[int]:
        """Process ids of the current ranks."""
        return children(self.pid)

    def signal(self, number: int) -> None:
        """Sends a signal to the launcher only."""
        os.kill(self.pid, number)

    def kill_launcher(self) -> list[int]:
        """Sends SIGKILL to the launcher only; returns its ranks, which the kernel should kill."""
        ranks = self.ranks()
        os.kill(self.pid, signal.SIGKILL)
        self.wait()
        return ranks

    def kill_tree(self) -> list[int]:
        """Sends SIGKILL to launcher and ranks at once; returns the ranks."""
        ranks = self.ranks()
        for pid in (self.pid, *ranks):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.wait()
        return ranks

    def output(self) -> str:
        return self._output.read_text(errors="replace")


def children(pid: int) -> list[int]:
    """Process ids of a process's children; empty if it has ended."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def is_running(pid: int) -> bool:
    """Whether the process exists and is not a zombie, because there may be no process to reap it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


class TorchrunTraining(Training):
    """Starts ``torchrun train.py``.

    Args:
        arguments: arguments of train.py.
        ranks: number of ranks on this host.
        restarts: number of restarts in place after failures.
        output: file for the output.
        environment: variables to add.
    """

    def __init__(
        self, arguments: Sequence[str], ranks: int, restarts: int, output: Path, environment: Mapping[str, str]
    ) -> None:
        restarting = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # see launch/environment.sh
        with output.open("w") as stream:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--max-restarts",
                 str(restarts), "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--monitor-interval", "0.1",
                 "train.py", *arguments],
                cwd=ROOT, env=os.environ | CPU | restarting | {"PYTHONUNBUFFERED": "1"} | dict(environment),
                stdout=stream, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        super().__init__(self._process.pid, output)

    def poll(self) -> int | None:
        return self._process.poll()


class WarmTraining(Training):
    """Starts the same, forked from a process that has imported everything; ``prepare`` is called in each rank.

    Its launcher behaves like torchrun: it forwards SIGTERM, ends all ranks as soon as one fails, and restarts them up
    to ``restarts`` times.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        ranks: int,
        restarts: int,
        output: Path,
        environment: Mapping[str, str],
        prepare: Prepare | None = None,
    ) -> None:
        start_server()
        context = multiprocessing.get_context("forkserver")
        self._process = context.Process(
            target=_launch, args=(list(arguments), ranks, restarts, output, dict(environment), prepare), daemon=True
        )
        output.touch()
        self._process.start()
        assert self._process.pid is not None
        super().__init__(self._process.pid, output)

    def poll(self) -> int | None:
        return self._process.exitcode


def start_server() -> None:
    """Starts the server process once; it ends with this process."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(_WARM)
    given = {name: os.environ.get(name) for name in (*CPU, "PYTHONPATH")}
    os.environ.update(CPU | {"PYTHONPATH": str(ROOT)})
    try:
        ensure_running()
    finally:
        for name, value in given.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _launch(
    arguments: list[str], ranks: int, restarts: int, output: Path, environment: dict[str, str], prepare: Prepare | None
) -> None:
    from dynmoe.launched import end_with_parent

    end_with_parent(os.getppid())
    os.setsid()
    missing = [name for name in _WARM if name not in sys.modules]
    with output.open("a") as stream:
        for descriptor in (1, 2):
            os.dup2(stream.fileno(), descriptor)
    assert not missing, f"the server could not import {missing}"
    os.chdir(ROOT)
    os.environ.update(CPU | environment)
    stop_requests: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stop_requests.append(number))
    for _ in range(restarts + 1):
        port = free_port()
        processes = [_fork_rank(arguments, rank, ranks, port, prepare) for rank in range(ranks)]
        if _wait_for(processes, stop_requests):
            sys.exit(0)
        if stop_requests:
            break
    sys.exit(1)


def free_port() -> int:
    """A port that no connection takes before it is used: these have numbers above 32,767."""
    while True:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", _RANDOM.randrange(20_000, 32_000)))
            return probe.getsockname()[1]


def _fork_rank(arguments: list[str], rank: int, ranks: int, port: int, prepare: Prepare | None) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.setsid()
        count = str(ranks)
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=count, LOCAL_WORLD_SIZE=count, MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )  # fmt: skip
        sys.argv = ["train.py", *arguments]
        status = _run_rank(rank, prepare)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _run_rank(rank: int, prepare: Prepare | None) -> int:
    import train
    from dynmoe.cli import run_tool

    if prepare is not None:
        prepare(rank)
    try:
        run_tool(train.main)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    return 0


def _wait_for(processes: list[int], stop_requests: list[int]) -> bool:
    """Waits for all processes; returns whether all succeeded. On a failure or a stop request, stops the others."""
    running = set(processes)
    failed = False
    deadline = float("inf")
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            running.discard(pid)
            failed = failed or os.waitstatus_to_exitcode(status) != 0
        else:
            time.sleep(0.005)
        if (failed or stop_requests) and deadline == float("inf"):
            deadline = time.monotonic() + _TIME_TO_SAVE_S
            _signal_all(running, signal.SIGTERM)
        if time.monotonic() > deadline:
            _signal_all(running, signal.SIGKILL)
    return not failed


def _signal_all(pids: set[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def join_ranks(rank: int, ranks: int, folder: Path) -> None:
    """Makes this process one of ``ranks`` on this host, which rendezvous in ``folder``, each with its GPU if any."""
    import torch
    import torch.distributed as dist

    count = str(ranks)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(rank)
    store = dist.FileStore(str(folder / "store"), ranks)
    dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=ranks)
