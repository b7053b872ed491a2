"""Converts a run's latest checkpoint to the other engine: python -m dynmoe.convert RUN --engine megatron|deepspeed"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path

from dynmoe.cli import EXIT_USER_ERROR, run_tool
from dynmoe.config import Config, load_config
from dynmoe.config.parallel import ParallelConfig
from dynmoe.errors import UserError
from dynmoe.launched import end_with_parent
from dynmoe.routers import ROUTERS


def convert(run: Path, output: Path, engine: str, parallel: ParallelConfig | None = None) -> Config:
    """Creates the run directory ``output`` for the other engine, with bitwise identical masters and moments.

    The whole model with gradients, optimizer state and a copy of it must fit into host memory, whatever the layout of
    the run: about 33 bytes per parameter to convert to DeepSpeed, 60 to Megatron.

    Args:
        run: directory of a run.
        output: directory of the new run; must not exist.
        engine: ``megatron`` or ``deepspeed``.
        parallel: parallel sizes of the new run; default: the old ones that the engine supports.

    Returns:
        The configuration of the new run.

    Raises:
        UserError: the run has no checkpoint or is one of ``engine``, or the output exists.
    """
    from dynmoe.train.checkpoint import continue_run, latest_valid

    if output.exists():
        raise UserError(f"--output={output}: exists; name a new directory")
    config = load_config(run / "config.yaml")
    if config.engine == engine:
        raise UserError(f"--engine={engine}: {run} already uses this engine; name the other one")
    source = latest_valid(run / "checkpoints")
    new = _configuration(config, output, engine, parallel)
    continue_run(source, new, output, lambda target: _write_in_host_memory(engine, run, source.path, target))
    return new


def _write_in_host_memory(*arguments: Path | str) -> None:
    """Calls :func:`_write`, on a machine with GPUs in a process that sees none.

    Megatron's engine would use a GPU, which holds less than the host.
    """
    import torch

    if not torch.cuda.is_available():
        _write(*arguments)
        return
    registered = {router.__module__ for router in ROUTERS.values()}
    modules = ",".join(sorted(name for name in registered if not name.startswith(("dynmoe.", "__main__"))))
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, str(os.getpid()), modules, *map(str, arguments)], check=False,
        stderr=subprocess.PIPE, text=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    if done.returncode == EXIT_USER_ERROR:
        raise UserError(done.stderr.splitlines()[-1].removeprefix("error: "))
    if done.returncode == -signal.SIGKILL:
        cure = f"free host memory: {_MEMORY}"
        raise UserError(f"conversion: the process that holds the whole model was killed; {cure}")
    if done.returncode:
        raise RuntimeError(f"conversion ended with status {done.returncode}:\n{done.stderr}")


_MEMORY = "about 33 bytes per parameter are needed to convert to deepspeed, 60 to megatron"
_CHILD = "from dynmoe.convert import _serve; _serve()"


def _serve() -> None:
    """The process that :func:`_write_in_host_memory` starts."""
    parent, modules, *arguments = sys.argv[1:]
    end_with_parent(int(parent))
    for name in filter(None, modules.split(",")):
        importlib.import_module(name)
    run_tool(lambda: _write(*arguments))


def _write(engine: str | Path, run: str | Path, source: str | Path, target: str | Path) -> None:
    """Converts the files of a checkpoint of ``run``, from the directory ``source`` to ``target``."""
    from dynmoe.engines.megatron import conversion

    config = load_config(Path(run) / "config.yaml")
    train = dataclasses.replace(config.train, moe_backend="auto")  # nothing is computed
    alone = dataclasses.replace(config, engine="megatron", parallel=ParallelConfig(), train=train)
    write = conversion.to_canonical if engine == "deepspeed" else conversion.from_canonical
    write(alone, Path(source), Path(target))


def _configuration(config: Config, output: Path, engine: str, parallel: ParallelConfig | None) -> Config:
    if parallel is None:
        ours = config.parallel
        parallel = ours if engine == "megatron" else ParallelConfig(expert=ours.expert, elastic=ours.elastic)
    run = dataclasses.replace(config.run, dir=str(output.parent), name=output.name)
    return dataclasses.replace(config, engine=engine, run=run, parallel=parallel)


def main() -> None:
    parser = argparse.ArgumentParser("python -m dynmoe.convert", description=__doc__)
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--engine", required=True, choices=("megatron", "deepspeed"), help="engine of the new run")
    parser.add_argument("--output", type=Path, help="directory of the new run (default: RUN-ENGINE)")
    given = parser.parse_args()
    output = given.output or given.run.with_name(f"{given.run.name}-{given.engine}")
    config = convert(given.run, output, given.engine)
    print(f"{output}: a {given.engine} run with the same weights and optimizer state.")
    print(f"Resume training with: {config.training_command}")


if __name__ == "__main__":
    run_tool(main)
