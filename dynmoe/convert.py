"""Writes a run's newest checkpoint for the other engine: python -m dynmoe.convert RUN --engine megatron|deepspeed"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from dynmoe.cli import run_tool
from dynmoe.config import Config, load_config
from dynmoe.config.parallel import ParallelConfig
from dynmoe.errors import UserError


def convert(run: Path, output: Path, engine: str, parallel: ParallelConfig | None = None) -> Config:
    """Makes the run directory ``output``, which the other engine trains on; bitwise the same masters and moments.

    The model is built whole, in this process: whatever layout the run had, it needs memory for all of it.

    Args:
        run: directory of a run.
        output: directory of the new run; must not exist.
        engine: ``megatron`` or ``deepspeed``.
        parallel: sizes of the new run; as far as the engine has them those of the old one by default.

    Returns:
        The configuration of the new run.

    Raises:
        UserError: no checkpoint, one of that engine already, or an output that exists.
    """
    from dynmoe.engines.megatron import checkpoint as megatron
    from dynmoe.train.checkpoint import continue_run, newest_sound

    if output.exists():
        raise UserError(f"--output: {output} exists; name a new directory")
    config = load_config(run / "config.yaml")
    if config.engine == engine:
        raise UserError(f"--engine={engine}: {run} is a run of this engine; name the other one")
    source = newest_sound(run / "checkpoints")
    new = _configuration(config, output, engine, parallel)
    alone = dataclasses.replace(config, engine="megatron", parallel=ParallelConfig())
    write = megatron.to_plain if engine == "deepspeed" else megatron.from_plain
    continue_run(source, new, output, lambda target: write(alone, source.path, target))
    return new


def _configuration(config: Config, output: Path, engine: str, parallel: ParallelConfig | None) -> Config:
    if parallel is None:
        parallel = config.parallel if engine == "megatron" else ParallelConfig(expert=config.parallel.expert)
    run = dataclasses.replace(config.run, dir=str(output.parent), name=output.name)
    return dataclasses.replace(config, engine=engine, run=run, parallel=parallel)


def main() -> None:
    parser = argparse.ArgumentParser("python -m dynmoe.convert", description=__doc__)
    parser.add_argument("run", type=Path, help="directory of the run")
    parser.add_argument("--engine", required=True, choices=("megatron", "deepspeed"), help="that is to train on")
    parser.add_argument("--output", type=Path, help="directory of the new run; default: RUN-ENGINE")
    given = parser.parse_args()
    output = given.output or given.run.with_name(f"{given.run.name}-{given.engine}")
    convert(given.run, output, given.engine)
    print(f"{output}: a run of {given.engine} with the same weights and optimizer state.")
    print(f"Train on with: torchrun train.py {output / 'config.yaml'}")


if __name__ == "__main__":
    run_tool(main)
