"""Converts a run's latest checkpoint to the other engine: python -m dynmoe.convert RUN --engine megatron|deepspeed"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from dynmoe.cli import run_tool
from dynmoe.config import Config, load_config
from dynmoe.config.parallel import ParallelConfig
from dynmoe.errors import UserError


def convert(run: Path, output: Path, engine: str, parallel: ParallelConfig | None = None) -> Config:
    """Creates the run directory ``output`` for the other engine, with bitwise identical masters and moments.

    The whole model with gradients and optimizer state must fit into host memory, whatever the layout of the run: 16
    bytes per parameter in fp32, 18 in bf16.

    Args:
        run: directory of a run.
        output: directory of the new run; must not exist.
        engine: ``megatron`` or ``deepspeed``.
        parallel: parallel sizes of the new run; default: the old ones that the engine supports.

    Returns:
        The configuration of the new run.

    Raises:
        UserError: the run has no checkpoint or is one of ``engine``, the output exists, or memory is not sufficient.
    """
    from dynmoe.train.checkpoint import continue_run, latest_valid

    if output.exists():
        raise UserError(f"--output={output}: exists; name a new directory")
    config = load_config(run / "config.yaml")
    if config.engine == engine:
        raise UserError(f"--engine={engine}: {run} already uses this engine; name the other one")
    source = latest_valid(run / "checkpoints")
    new = _configuration(config, output, engine, parallel)
    alone = dataclasses.replace(config, engine="megatron", parallel=ParallelConfig())
    continue_run(source, new, output, lambda target: _without_gpus(_write, engine, alone, source.path, target))
    return new


def _write(engine: str, alone: Config, source: Path, target: Path) -> None:
    """Converts the files of a checkpoint."""
    from dynmoe.engines.megatron import conversion

    write = conversion.to_canonical if engine == "deepspeed" else conversion.from_canonical
    try:
        write(alone, source, target)
    except UserError as error:  # of a kind that every process can receive
        raise UserError(str(error)) from None


def _without_gpus(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function, on a machine with GPUs in a process that sees none.

    Megatron's engine would use a GPU, which holds less than the host.
    """
    import torch

    if not torch.cuda.is_available():
        return function(*arguments)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _hide_gpus) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool:
            problem = "the process that holds the whole model was killed"
            cure = "free host memory: 16 bytes per parameter are needed in fp32, 18 in bf16"
            raise UserError(f"conversion: {problem}; {cure}") from None


def _hide_gpus() -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def _configuration(config: Config, output: Path, engine: str, parallel: ParallelConfig | None) -> Config:
    if parallel is None:
        parallel = config.parallel if engine == "megatron" else ParallelConfig(expert=config.parallel.expert)
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
